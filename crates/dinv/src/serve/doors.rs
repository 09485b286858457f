//! The interfaces of other programs, as far as they can apply a learned difference: `img2img` of Stable Diffusion web UI
//! and the image edits of OpenAI. A request becomes a job like any other, and is answered when the job is over.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use difference_inversion::Error;
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::cli::signals;

use super::differences;
use super::http::{App, BETWEEN_EVENTS, Shared, blocking, body, checked, follower, job_file, ok};
use super::job::State as Progress;
use super::problem::{Answer, Problem};
use super::request::{self, Origin};

/// The minimum time between two looks at a job.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

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
    /// The field that they come from.
    field: &'static str,
    settings: Map<String, Value>,
}

/// A finished job's pictures.
struct Made {
    id: String,
    /// Name and bytes.
    pictures: Vec<(String, Vec<u8>)>,
    notes: Vec<String>,
}

/// A job that a client waits for. It is cancelled when the client disconnects.
struct Awaited {
    app: Arc<App>,
    id: String,
}

impl Drop for Awaited {
    fn drop(&mut self) {
        let _ = self.app.store.cancel(&self.id); // a job that is over stays as it is
    }
}

impl Wanted {
    /// Queues the job.
    fn queue(self, app: &Arc<App>) -> Answer<Awaited> {
        let (found, most) = (self.pictures.len(), request::MOST[1]);
        if !(1..=most).contains(&found) {
            let message = format!(
                "{}: expected 1 to {most} pictures, found {found}",
                self.field
            );
            return Err(Problem::field(self.field, message));
        }
        // Before there is a copy for each picture.
        let longest = request::LONGEST_TEXT;
        if self.caption.len() > longest {
            let message = format!("prompt: a text has more than {longest} bytes");
            return Err(Problem::field("prompt", message));
        }
        let mut settings = self.settings;
        if let Some(strength) = self.strength {
            settings.insert("strength".to_owned(), json!(strength));
        }
        // A client that names no model means the one that the difference was learned on.
        if !settings.contains_key("model") {
            let known = differences::all(&app.store)?.into_iter();
            let known = known.filter(|known| known["name"] == self.difference);
            let model = known.map(|mut known| known["model"].take()).next();
            settings.extend(
                model
                    .filter(Value::is_string)
                    .map(|model| ("model".to_owned(), model)),
            );
        }
        let caption = (!self.caption.is_empty()).then_some(self.caption);
        let targets = (self.pictures.into_iter()).map(|picture| match &caption {
            Some(caption) => json!({ "picture": picture, "caption": caption }),
            None => json!({ "picture": picture }),
        });
        let request = json!({
            "kind": "apply", "difference": self.difference, "targets": targets.collect::<Vec<_>>(),
            "settings": settings,
        });
        let origin = Origin {
            is_waited_for: true,
            ..Origin::default()
        };
        let job = request::accept(app, serde_json::from_value(request)?, origin)?;
        Ok(Awaited {
            app: Arc::clone(app),
            id: job["id"].as_str().unwrap_or_default().to_owned(),
        })
    }
}

impl Awaited {
    /// Waits until the job is over, and reads its pictures.
    async fn made(self) -> Answer<Made> {
        let _place = follower(&self.app)?;
        let mut changes = self.app.store.changes();
        loop {
            changes.borrow_and_update();
            if self.app.store.state(&self.id)?.is_final() {
                break;
            }
            if signals::stopping() {
                let message = "the server stops";
                return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, message));
            }
            // A stop changes no job.
            let _ = tokio::time::timeout(BETWEEN_EVENTS, changes.changed()).await;
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        let job = self.app.store.get(&self.id)?.stored;
        match job.state {
            Progress::Done => {}
            Progress::Failed => {
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
        let read = move || {
            let results = job
                .results
                .iter()
                .filter(|result| result["kind"] == "picture");
            let names = results.filter_map(|result| result["url"].as_str()?.rsplit('/').next());
            let pictures = names.map(|name| {
                let path = job_file(&self.app.store, &self.id, name);
                let path = path.ok_or_else(|| Problem::not_found("file"))?;
                let bytes = fs::read(&path).map_err(Error::io(&path))?;
                Ok((name.to_owned(), bytes))
            });
            Ok(Made {
                pictures: pictures.collect::<Answer<_>>()?,
                id: self.id.clone(),
                notes: job.notes,
            })
        };
        blocking(read).await
    }
}

/// Reads `NAME` or `NAME:STRENGTH`.
fn named(text: &str, field: &str) -> Answer<(String, Option<f64>)> {
    let Some((name, strength)) = text.split_once(':') else {
        return Ok((text.trim().to_owned(), None));
    };
    match strength.trim().parse::<f64>() {
        Ok(number) if number.is_finite() => Ok((name.trim().to_owned(), Some(number))),
        _ => {
            let message = format!("{field}: expected a number as the strength, found `{strength}`");
            Err(Problem::field(field, message))
        }
    }
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

/// An `img2img` request. Clients send all of its many fields; those that are not named here are not read.
#[derive(Deserialize)]
struct Img2Img {
    init_images: Vec<String>,
    prompt: String,
    negative_prompt: Option<String>,
    seed: Option<i64>,
    steps: Option<u64>,
    #[serde(default)]
    override_settings: Map<String, Value>,
    send_images: Option<bool>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Whether a field that would change the picture in a way that cannot be done is set.
fn asks_for_more(name: &str, value: &Value) -> bool {
    let is_empty = match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(all) => all.is_empty(),
        Value::Object(all) => all.is_empty(),
        _ => false,
    };
    match name {
        "batch_size" | "n_iter" => !value.is_null() && value.as_f64() != Some(1.0),
        "mask" | "script_name" | "alwayson_scripts" | "styles" => !is_empty,
        _ => false,
    }
}

impl Img2Img {
    fn read(sent: &[u8]) -> Answer<Self> {
        let asked: Self = request::read(sent)?;
        let more = asked
            .others
            .iter()
            .find(|(name, value)| asks_for_more(name, value));
        if let Some((name, _)) = more {
            let message = format!("{name}: not supported when a difference is applied");
            return Err(Problem::field(name.as_str(), message));
        }
        Ok(asked)
    }

    /// The names of the fields that were not read.
    fn not_read(&self) -> Vec<String> {
        let settings = self
            .override_settings
            .keys()
            .filter(|name| *name != CHECKPOINT);
        let settings = settings.map(|name| format!("override_settings.{name}"));
        self.others.keys().cloned().chain(settings).collect()
    }

    /// What is asked for; takes the pictures.
    fn wanted(&mut self) -> Answer<Wanted> {
        let (difference, strength, caption) = marked(&self.prompt)?;
        let mut settings = Map::new();
        let mut set = |setting: &str, value: Value| settings.insert(setting.to_owned(), value);
        // A seed of −1 asks for any; the program's default is fixed.
        if let Some(seed) = self.seed.filter(|seed| *seed >= 0) {
            set("seed", json!(seed));
        }
        if let Some(steps) = self.steps {
            set("num_inference_steps", json!(steps));
        }
        if let Some(text) = self
            .negative_prompt
            .as_ref()
            .filter(|text| !text.is_empty())
        {
            set("negative_prompt", json!(text));
        }
        if let Some(model) = self.override_settings.get(CHECKPOINT) {
            set("model", model.clone());
        }
        Ok(Wanted {
            difference,
            strength,
            caption,
            pictures: std::mem::take(&mut self.init_images)
                .iter()
                .map(|picture| data_url(picture))
                .collect(),
            field: "init_images",
            settings,
        })
    }
}

/// The setting of Stable Diffusion web UI that names the model.
const CHECKPOINT: &str = "sd_model_checkpoint";

/// `POST /sdapi/v1/img2img`
pub(super) async fn img2img(
    State(app): Shared,
    headers: HeaderMap,
    sent: Body,
) -> Answer<Response> {
    let sent = body(&app, &headers, sent).await?;
    let (asked, awaited) = checked(&app, move |app| {
        let mut asked = Img2Img::read(&sent)?;
        let awaited = asked.wanted()?.queue(app)?;
        Ok((asked, awaited))
    })
    .await?;
    let made = awaited.made().await?;
    let answer = move || {
        let seed = asked.seed.filter(|seed| *seed >= 0).unwrap_or(0);
        let count = made.pictures.len();
        let info = json!({
            "prompt": asked.prompt, "all_prompts": vec![&asked.prompt; count],
            "seed": seed, "all_seeds": vec![seed; count],
            "job": made.id, "notes": made.notes, "not_read": asked.not_read(),
        });
        let pictures = made
            .pictures
            .iter()
            .filter(|_| asked.send_images != Some(false));
        let images: Vec<String> = pictures.map(|(_, bytes)| STANDARD.encode(bytes)).collect();
        let mut parameters = asked.others;
        parameters.insert("prompt".to_owned(), json!(asked.prompt));
        parameters.insert("seed".to_owned(), json!(seed));
        parameters.insert("steps".to_owned(), json!(asked.steps));
        Ok(ok(
            &json!({ "images": images, "parameters": parameters, "info": info.to_string() }),
        ))
    };
    blocking(answer).await
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
                if form.pictures.len() == request::MOST[1] {
                    let message = format!("image: more than {} pictures", request::MOST[1]);
                    return Err(Problem::field("image", message));
                }
                form.pictures.push(data_url(&STANDARD.encode(bytes)));
            } else if name == "mask" {
                let message = "mask: not supported when a difference is applied";
                return Err(Problem::field("mask", message));
            } else {
                let text = String::from_utf8(part.bytes().await.map_err(wrong)?.to_vec());
                let text = text.map_err(|_| {
                    Problem::field(name.as_str(), format!("{name}: expected text in UTF-8"))
                })?;
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
pub(super) async fn image_edits(app: Shared, headers: HeaderMap, sent: Body) -> Response {
    let mut response = edited(app, headers, sent).await.into_response();
    // OpenAI's clients repeat a request that failed or was cancelled, unless they are told not to.
    response
        .headers_mut()
        .insert("x-should-retry", HeaderValue::from_static("false"));
    response
}

async fn edited(State(app): Shared, headers: HeaderMap, sent: Body) -> Answer<Response> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let kind = text(header::CONTENT_TYPE).unwrap_or_default().to_owned();
    let form = Form::read(&kind, body(&app, &headers, sent).await?).await?;
    form.check("n", &["1"])?;
    form.check("size", &["auto"])?;
    form.check("stream", &["false"])?;
    form.check("output_format", &["png"])?;
    form.check("response_format", &["b64_json", "url"])?;
    let host = text(header::HOST).filter(|_| form.text("response_format") == "url");
    if host.is_some() && app.options.token.is_some() {
        let message =
            "response_format: with a token, pictures have no address that a client can open";
        return Err(Problem::field("response_format", message).hint("ask for `b64_json`"));
    }
    let host = host.map(str::to_owned);
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
        pictures: form.pictures,
        field: "image",
        settings: Map::new(),
    };
    let made = checked(&app, move |app| wanted.queue(app))
        .await?
        .made()
        .await?;
    let answer = move || {
        let data = made.pictures.iter().map(|(name, bytes)| match &host {
            Some(host) => {
                json!({ "url": format!("http://{host}/v1/jobs/{}/files/{name}", made.id) })
            }
            None => json!({ "b64_json": STANDARD.encode(bytes) }),
        });
        let created = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(0, |time| time.as_secs());
        Ok(ok(
            &json!({ "created": created, "data": data.collect::<Vec<_>>() }),
        ))
    };
    blocking(answer).await
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
            "<dinv:sunset:nan>",
            "<dinv:sunset:1e999>",
            "<dinv:sunset> <dinv:snow>",
            "<dinv:sunset> <lora:style:1>",
        ] {
            assert!(marked(wrong).is_err(), "{wrong}");
        }
    }
}
