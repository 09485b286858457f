//! Time limits, which the program's tests would have to wait for, and the wording of captions.

use std::net::TcpListener;
use std::thread;

use super::*;

/// A server on loopback that takes connections and never answers.
fn silent() -> ServedCaptioner {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}#m", listener.local_addr().unwrap());
    thread::spawn(move || {
        let held: Vec<_> = listener.incoming().collect();
        drop(held);
    });
    ServedCaptioner {
        patience: Duration::from_millis(300),
        ..ServedCaptioner::new(address.parse().unwrap(), None).unwrap()
    }
}

#[test]
fn a_server_that_does_not_answer_is_given_up() {
    let served = silent();
    let picture = RgbImage::new(8, 8);
    for error in [
        served.caption(&picture).unwrap_err(),
        served.models().unwrap_err(),
    ] {
        let expected = format!(
            "captioner {}: no answer within 300 ms",
            served.address.base()
        );
        assert_eq!(error.to_string(), expected);
        assert!(error.hint().unwrap().contains("a smaller model"));
    }
    let limit = PATIENCE;
    let problem = CaptionProblem::TooSlow { limit };
    assert_eq!(problem.to_string(), "no answer within 20 minutes");
    assert!(!problem.is_temporary());
}

#[test]
fn a_caption_is_one_plain_line() {
    for (said, expected) in [
        ("A red house.", "A red house"),
        (" \"a red\n house\" ", "a red house"),
        ("“A red house.”", "A red house"),
        ("The image shows a red house", "a red house"),
        ("This photograph depicts snow.", "snow"),
        ("the picture on the wall", "the picture on the wall"),
        ("the image shows", "the image shows"),
        ("a\u{1b}[31m red house", "a [31m red house"),
        ("...", ""),
    ] {
        assert_eq!(tidied(said), expected, "{said}");
    }
}

#[test]
fn json_is_found_in_a_fence_and_between_words() {
    let json = r#"{"before": "a", "after": "b"}"#;
    for said in [
        json.to_owned(),
        format!("```json\n{json}\n```"),
        format!("Here it is: {json} I hope it helps."),
    ] {
        assert_eq!(inside_fence(&said), json);
    }
    assert_eq!(inside_fence("no object"), "no object");
}

#[test]
fn a_key_is_not_shown() {
    let address: ServerAddress = "http://localhost:1#m".parse().unwrap();
    let served = ServedCaptioner::new(address.clone(), Some("sk-secret".to_owned())).unwrap();
    assert!(!format!("{served:?}").contains("secret"));
    let error = ServedCaptioner::new(address, Some("sk secret\r\nx: y".to_owned()));
    let error = error.unwrap_err();
    assert!(!error.to_string().contains("secret"), "{error}");
}
