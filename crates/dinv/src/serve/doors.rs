//! The interfaces of other programs, as far as they can apply a learned difference: `img2img` of Stable Diffusion web UI
//! and the image edits of OpenAI. A request becomes a job like any other, and is answered when the job is over.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use difference_inversion::Error;
use futures_util::stream;
use serde_json::{Map, Value, json};

use super::differences;
use super::http::{App, blocking, body, job_file, ok, queue};
use super::job;
use super::problem::{Answer, Problem};

/// Tells a prompt where the difference is: `<dinv:NAME>` or `<dinv:NAME:STRENGTH>`.
const MARK: &str = "<dinv:";

/// What both doors ask for: a difference, applied to pictures.
struct Wanted {
    difference: String,
    strength: Option<f64>,
    /// The caption of all pictures; the captioner writes them where it is empty.
    caption: String,
    /// Data URLs.
    pictures: Vec<String>,
    settings: Map<String, Value>,
}

/// A finished job's pictures.
struct Made {
    id: String,
    /// Name and bytes.
    pictures: Vec<(String, Vec<u8>)>,
    notes: Vec<String>,
}

/// Cancels a job whose client has gone.
struct Abandoned<'a> {
    app: &'a App,
    id: &'a str,
}

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        let _ = self.app.store.cancel(self.id); // a job that is over stays as it is
    }
}

impl Wanted {
    /// Queues the job, waits until it is over, and reads its pictures.
    async fn make(self, app: &Arc<App>) -> Answer<Made> {
        let caption = (!self.caption.is_empty()).then_some(self.caption);
        let targets: Vec<Value> = (self.pictures.iter())
            .map(|picture| match &caption {
                Some(caption) => json!({ "picture": picture, "caption": caption }),
                None => json!({ "picture": picture }),
            })
            .collect();
        let mut settings = self.settings;
        if let Some(strength) = self.strength {
            settings.insert("strength".to_owned(), json!(strength));
        }
        // A client that names no model means the one that the difference was learned on.
        if !settings.contains_key("model") {
            let (app, name) = (Arc::clone(app), self.difference.clone());
            let known = blocking(move || differences::all(&app.store)).await?;
            let known = known.into_iter().find(|known| known["name"] == name);
            let model = known.map(|mut known| known["model"].take());
            settings.extend(
                model
                    .filter(Value::is_string)
                    .map(|model| ("model".to_owned(), model)),
            );
        }
        let request = json!({
            "kind": "apply", "difference": self.difference, "targets": targets, "settings": settings,
        });
        let job = queue(app, request.to_string().into_bytes(), None).await?;
        let id = job["id"].as_str().unwrap_or_default().to_owned();
        let abandoned = Abandoned { app, id: &id };
        let mut changes = app.store.changes();
        let job = loop {
            changes.borrow_and_update();
            let job = app.store.get(&id)?;
            if job.stored.state.is_final() {
                break job.stored;
            }
            changes.changed().await?;
        };
        std::mem::forget(abandoned);
        match job.state {
            job::State::Done => {}
            job::State::Failed => {
                let error = job.error.unwrap_or_default();
                let text = |field: &str| error[field].as_str().map(str::to_owned);
                let message = text("message").unwrap_or_else(|| "the job failed".to_owned());
                let problem = Problem::new(StatusCode::INTERNAL_SERVER_ERROR, message);
                return Err(match text("hint") {
                    Some(hint) => problem.hint(hint),
                    None => problem,
                });
            }
            _ => return Err(Problem::conflict("the job was cancelled")),
        }
        let results = job.results;
        let (store, folder) = (Arc::clone(app), id.clone());
        let read = move || {
            let names = (results.iter().filter(|result| result["kind"] == "picture"))
                .filter_map(|result| result["url"].as_str()?.rsplit('/').next());
            names
                .map(|name| {
                    let path = job_file(&store.store, &folder, name)
                        .ok_or_else(|| Problem::not_found("file"))?;
                    let bytes = fs::read(&path).map_err(Error::io(&path))?;
                    Ok((name.to_owned(), bytes))
                })
                .collect::<Answer<Vec<_>>>()
        };
        Ok(Made {
            pictures: blocking(read).await?,
            id,
            notes: job.notes,
        })
    }
}

/// Reads `NAME` or `NAME:STRENGTH`.
fn named(text: &str, field: &str) -> Answer<(String, Option<f64>)> {
    let Some((name, strength)) = text.split_once(':') else {
        return Ok((text.trim().to_owned(), None));
    };
    let strength = strength.trim().parse().map_err(|_| {
        let message = format!("{field}: expected a number as the strength, found `{strength}`");
        Problem::field(field, message)
    })?;
    Ok((name.trim().to_owned(), Some(strength)))
}

/// The difference and its strength in a prompt, and the prompt without them.
fn marked(prompt: &str) -> Answer<(String, Option<f64>, String)> {
    let missing = || {
        let message = "prompt: it names no difference";
        Problem::field("prompt", message)
            .hint("write `<dinv:NAME:STRENGTH>`; `GET /v1/differences` lists the names")
    };
    let (before, rest) = prompt.split_once(MARK).ok_or_else(missing)?;
    let (mark, after) = rest.split_once('>').ok_or_else(missing)?;
    let caption = format!("{} {}", before.trim(), after.trim());
    if caption.contains(MARK) {
        let message = "prompt: it names several differences, and one can be applied at a time";
        return Err(Problem::field("prompt", message));
    }
    if let Some(start) = caption.find("<lora:").or(caption.find("<lyco:")) {
        let mark = caption[start..].split_inclusive('>').next();
        let message = format!("prompt: `{}` is not read here", mark.unwrap_or_default());
        return Err(Problem::field("prompt", message)
            .hint("name the LoRA where the difference is learned: the setting `lora`"));
    }
    let (name, strength) = named(mark, "prompt")?;
    Ok((name, strength, caption.trim().to_owned()))
}

/// A picture in base64, as a data URL.
fn data_url(text: &str) -> String {
    match text.starts_with("data:") {
        true => text.to_owned(),
        false => format!("data:image/png;base64,{text}"),
    }
}

/// The fields of `img2img` that are read.
const READ: [&str; 6] = [
    "init_images",
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "override_settings",
];

/// Whether a field that would change the picture in a way that cannot be done is set.
fn asks_for_more(name: &str, value: &Value) -> bool {
    match name {
        "batch_size" | "n_iter" => value.as_f64().is_some_and(|count| count > 1.0),
        "mask" | "script_name" => value.as_str().is_some_and(|text| !text.is_empty()),
        "alwayson_scripts" => value.as_object().is_some_and(|scripts| !scripts.is_empty()),
        "styles" => value.as_array().is_some_and(|styles| !styles.is_empty()),
        _ => false,
    }
}

/// What an `img2img` request asks for.
fn of_img2img(asked: &Map<String, Value>) -> Answer<Wanted> {
    if let Some((name, _)) = asked
        .iter()
        .find(|(name, value)| asks_for_more(name, value))
    {
        let message = format!("{name}: this is not done when a difference is applied");
        return Err(Problem::field(name.as_str(), message));
    }
    let text = |name: &str| asked.get(name).and_then(Value::as_str).unwrap_or_default();
    let (difference, strength, caption) = marked(text("prompt"))?;
    let pictures = asked.get("init_images").and_then(Value::as_array);
    let pictures = pictures.into_iter().flatten().map(|picture| {
        let wrong = || Problem::field("init_images", "init_images: expected pictures in base64");
        Ok(data_url(picture.as_str().ok_or_else(wrong)?))
    });
    let mut settings = Map::new();
    let mut set = |setting: &str, value: &Value| {
        settings.insert(setting.to_owned(), value.clone());
    };
    // A seed of −1 asks for any; the program's default is one.
    if let Some(seed) = asked.get("seed").filter(|seed| seed.as_f64() >= Some(0.0)) {
        set("seed", seed);
    }
    if let Some(steps) = asked.get("steps").filter(|steps| !steps.is_null()) {
        set("num_inference_steps", steps);
    }
    if !text("negative_prompt").is_empty() {
        set("negative_prompt", &asked["negative_prompt"]);
    }
    let model = (asked.get("override_settings")).and_then(|all| all.get("sd_model_checkpoint"));
    if let Some(model) = model.filter(|model| !model.is_null()) {
        set("model", model);
    }
    Ok(Wanted {
        difference,
        strength,
        caption,
        pictures: pictures.collect::<Answer<_>>()?,
        settings,
    })
}

/// `POST /sdapi/v1/img2img`
pub(super) async fn img2img(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    sent: Body,
) -> Answer<Response> {
    let sent = body(&app, &headers, sent).await?;
    let asked: Value = serde_json::from_slice(&sent)
        .map_err(|error| Problem::field("", format!("the request is not valid: {error}")))?;
    let Value::Object(mut asked) = asked else {
        return Err(Problem::field(
            "",
            "the request is not valid: expected an object",
        ));
    };
    let wanted = of_img2img(&asked)?;
    let (prompt, seed) = (
        asked["prompt"].clone(),
        wanted.settings.get("seed").cloned(),
    );
    let seed = seed.unwrap_or_else(|| json!(0));
    let made = wanted.make(&app).await?;
    let images: Vec<String> = (made.pictures.iter())
        .map(|(_, bytes)| STANDARD.encode(bytes))
        .collect();
    let not_read: Vec<&String> = (asked.keys())
        .filter(|name| !READ.contains(&name.as_str()))
        .collect();
    let info = json!({
        "prompt": prompt, "all_prompts": vec![&prompt; images.len()],
        "seed": seed, "all_seeds": vec![&seed; images.len()],
        "job": made.id, "notes": made.notes, "not_read": not_read,
    });
    asked.remove("init_images");
    let send = asked.get("send_images") != Some(&json!(false));
    Ok(ok(&json!({
        "images": if send { images } else { Vec::new() },
        "parameters": asked,
        "info": info.to_string(),
    })))
}

/// The parts of a form: texts, and pictures as data URLs.
struct Form {
    texts: BTreeMap<String, String>,
    pictures: Vec<String>,
}

impl Form {
    async fn read(kind: &str, sent: Vec<u8>) -> Answer<Self> {
        let wrong = |error: multer::Error| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                format!("the form is not valid: {error}"),
            )
        };
        let boundary = multer::parse_boundary(kind).map_err(wrong)?;
        let all = stream::iter([Ok::<_, std::io::Error>(sent)]);
        let mut parts = multer::Multipart::new(all, boundary);
        let mut form = Self {
            texts: BTreeMap::new(),
            pictures: Vec::new(),
        };
        while let Some(part) = parts.next_field().await.map_err(wrong)? {
            let name = part.name().unwrap_or_default().to_owned();
            if matches!(name.as_str(), "image" | "image[]") {
                let bytes = part.bytes().await.map_err(wrong)?;
                form.pictures.push(data_url(&STANDARD.encode(bytes)));
            } else if name == "mask" {
                let message = "mask: this is not done when a difference is applied";
                return Err(Problem::field("mask", message));
            } else {
                let text = part.text().await.map_err(wrong)?;
                form.texts.insert(name, text);
            }
        }
        Ok(form)
    }

    fn text(&self, name: &str) -> &str {
        self.texts.get(name).map_or("", String::as_str)
    }

    /// Refuses a value that cannot be followed.
    fn check(&self, name: &str, allowed: &[&str]) -> Answer<()> {
        let found = self.text(name);
        if found.is_empty() || allowed.contains(&found) {
            return Ok(());
        }
        let allowed = allowed.join(" or ");
        Err(Problem::field(
            name,
            format!("{name}: expected {allowed}, found `{found}`"),
        ))
    }
}

/// `POST /v1/images/edits`
pub(super) async fn image_edits(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    sent: Body,
) -> Answer<Response> {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default().to_owned();
    let form = Form::read(&kind, body(&app, &headers, sent).await?).await?;
    form.check("n", &["1"])?;
    form.check("size", &["auto"])?;
    form.check("stream", &["false"])?;
    form.check("output_format", &["png"])?;
    form.check("response_format", &["b64_json", "url"])?;
    let model = form.text("model");
    if model.is_empty() {
        return Err(Problem::field(
            "model",
            "model: it names the difference to apply, and is missing",
        )
        .hint("`GET /v1/differences` lists the names; `NAME:STRENGTH` gives a strength, too"));
    }
    let (difference, strength) = named(model, "model")?;
    let wanted = Wanted {
        difference,
        strength,
        caption: form.text("prompt").trim().to_owned(),
        pictures: form.pictures.clone(),
        settings: Map::new(),
    };
    let made = wanted.make(&app).await?;
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let host = host.unwrap_or_default();
    let as_address = form.text("response_format") == "url";
    let data = made.pictures.iter().map(|(name, bytes)| match as_address {
        true => json!({ "url": format!("http://{host}/v1/jobs/{}/files/{name}", made.id) }),
        false => json!({ "b64_json": STANDARD.encode(bytes) }),
    });
    let created = std::time::UNIX_EPOCH
        .elapsed()
        .map_or(0, |time| time.as_secs());
    Ok(ok(
        &json!({ "created": created, "data": data.collect::<Vec<_>>() }),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_names_one_difference() {
        let read = |prompt: &str| marked(prompt).unwrap();
        let expected = ("sunset".to_owned(), Some(0.8), "a boat at sea".to_owned());
        assert_eq!(read("a boat <dinv:sunset:0.8> at sea"), expected);
        assert_eq!(
            read("<dinv:two words>"),
            ("two words".to_owned(), None, String::new())
        );
        for wrong in [
            "a boat",
            "<dinv:sunset",
            "<dinv:sunset:much>",
            "<dinv:sunset> <dinv:snow>",
            "<dinv:sunset> <lora:style:1>",
        ] {
            assert!(marked(wrong).is_err(), "{wrong}");
        }
    }
}
