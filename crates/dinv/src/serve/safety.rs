//! Access control: this machine's own pages and programs, and whoever knows the token, may use the server.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use subtle::ConstantTimeEq;

use super::problem::{Answer, Problem};

/// The cookie with a browser's token: requests for pictures and events have no other headers.
const COOKIE: &str = "dinv-token";

/// What the page may load: only resources of this server.
const POLICY: &str = "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; \
                      form-action 'self'; frame-ancestors 'none'";

/// Headers of every answer.
pub(crate) fn headers() -> [(HeaderName, HeaderValue); 5] {
    [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ]
    .map(|(name, value)| (name, HeaderValue::from_static(value)))
}

/// Checks that a request is allowed.
pub(crate) fn check(
    method: &Method,
    headers: &HeaderMap,
    listen: IpAddr,
    token: Option<&str>,
) -> Answer<()> {
    let host = text(headers, header::HOST);
    let refuse = |message: &str| Err(Problem::new(StatusCode::FORBIDDEN, message));
    // Another site's name can resolve to this address (DNS rebinding); its pages do not know the token.
    if token.is_none() && !host.is_some_and(|host| is_own(host, listen)) {
        return refuse("the request names another host than this machine's own");
    }
    let changes = method != Method::GET && method != Method::HEAD;
    if changes && !is_same_origin(headers, host) {
        return refuse("the request comes from a page of another site");
    }
    match token {
        Some(token) if !carried(headers).any(|given| same(&given, token)) => Err(Problem::new(
            StatusCode::UNAUTHORIZED,
            "the token is missing or wrong",
        )
        .hint(
            "open the page with /?token=TOKEN, or send the header `Authorization: Bearer TOKEN`",
        )),
        _ => Ok(()),
    }
}

/// Whether two secrets are equal, in a time that does not depend on where they differ.
pub(crate) fn same(one: &str, other: &str) -> bool {
    one.as_bytes().ct_eq(other.as_bytes()).into()
}

/// The header that sets the token cookie in a browser.
pub(crate) fn cookie(token: &str) -> String {
    let encoded: String = token.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{COOKIE}={encoded}; Path=/; HttpOnly; SameSite=Lax")
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// The tokens that a request carries.
fn carried(headers: &HeaderMap) -> impl Iterator<Item = String> {
    let bearer = text(headers, header::AUTHORIZATION);
    let bearer = bearer
        .and_then(|value| value.strip_prefix("Bearer "))
        .map(str::to_owned);
    let cookies = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let cookies = cookies.flat_map(|line| line.split(';'));
    let ours = cookies.filter_map(|cookie| cookie.trim().strip_prefix(COOKIE)?.strip_prefix('='));
    bearer.into_iter().chain(ours.filter_map(decoded))
}

/// Decodes a token from its cookie.
fn decoded(hex: &str) -> Option<String> {
    let digits: Option<Vec<u32>> = hex.chars().map(|c| c.to_digit(16)).collect();
    let bytes = digits?
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => u8::try_from(high * 16 + low).ok(),
            _ => None,
        })
        .collect::<Option<Vec<u8>>>()?;
    String::from_utf8(bytes).ok()
}

/// Whether a `Host` is this machine, or the address that the server listens on.
fn is_own(host: &str, listen: IpAddr) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, port)) if port.is_empty() || is_port(port) => name,
            _ => return false,
        },
        None => match host.find(':') {
            Some(colon) if !is_port(&host[colon..]) => return false,
            Some(colon) => &host[..colon],
            None => host,
        },
    };
    if name.eq_ignore_ascii_case("localhost") {
        return true;
    }
    let own = [
        Ipv4Addr::LOCALHOST.into(),
        Ipv6Addr::LOCALHOST.into(),
        listen,
    ];
    name.parse::<IpAddr>()
        .is_ok_and(|address| own.contains(&address))
}

fn is_port(text: &str) -> bool {
    let digits = text.strip_prefix(':');
    digits.is_some_and(|digits| digits.parse::<u16>().is_ok())
}

/// Whether a request that changes something comes from a page of this server, or from no page.
fn is_same_origin(headers: &HeaderMap, host: Option<&str>) -> bool {
    let site = text(headers, HeaderName::from_static("sec-fetch-site"));
    match site {
        Some("same-origin") => return true, // pages cannot set it, and a proxy may give the server another name
        Some("none") | None => {}
        Some(_) => return false,
    }
    let Some(origin) = headers.get(header::ORIGIN) else {
        return true;
    };
    let origin = origin.to_str().unwrap_or_default();
    let named = origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"));
    named
        .zip(host)
        .is_some_and(|(origin, host)| origin.eq_ignore_ascii_case(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn status(method: &Method, pairs: &[(&'static str, &str)], token: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        check(method, &headers, HOME, token).is_ok()
    }

    #[test]
    fn only_this_machine_is_answered() {
        for host in [
            "127.0.0.1:7865",
            "localhost",
            "LOCALHOST:1",
            "[::1]:7865",
            "[::1]",
        ] {
            assert!(status(&Method::GET, &[("host", host)], None), "{host}");
        }
        for host in [
            "example.com",
            "127.0.0.1.example.com:7865",
            "localhost:x",
            "[::1]x",
            "[::1",
            "127.0.0.2",
            "localhost.",
            "",
            "localhost:7865:1",
        ] {
            assert!(!status(&Method::GET, &[("host", host)], None), "{host}");
        }
        assert!(!status(&Method::GET, &[], None));
    }

    #[test]
    fn pages_of_other_sites_change_nothing() {
        let host = ("host", "localhost:1");
        let post = |pairs: &[(&'static str, &str)]| status(&Method::POST, pairs, None);
        assert!(post(&[host]));
        assert!(post(&[host, ("origin", "http://localhost:1")]));
        for origin in [
            "http://localhost:2",
            "null",
            "http://evil.example",
            "localhost:1",
            "",
        ] {
            assert!(!post(&[host, ("origin", origin)]), "{origin}");
        }
        // A proxy that terminates TLS may not pass the name on.
        let proxied = [host, ("origin", "https://dinv.example")];
        assert!(!post(&proxied));
        assert!(post(
            &[proxied, [("sec-fetch-site", "same-origin"); 2]].concat()
        ));
        assert!(!post(&[host, ("sec-fetch-site", "cross-site")]));
        assert!(!post(&[host, ("sec-fetch-site", "same-site")]));
    }

    #[test]
    fn the_token_is_carried_in_a_header_or_a_cookie() {
        let host = ("host", "any.example");
        let token = Some("a;b=c\"d1");
        let get = |pairs: &[(&'static str, &str)]| status(&Method::GET, pairs, token);
        assert!(!get(&[host]));
        assert!(get(&[host, ("authorization", "Bearer a;b=c\"d1")]));
        assert!(!get(&[host, ("authorization", "Bearer a;b=c\"d2")]));
        let cookie = cookie("a;b=c\"d1");
        let carried = cookie.split(';').next().unwrap();
        assert!(get(&[host, ("cookie", &format!("x=1; {carried}"))]));
        assert!(!get(&[host, ("cookie", &format!("{carried}00"))]));
        assert!(!get(&[host, ("cookie", "dinv-token=zz")]));
    }
}
