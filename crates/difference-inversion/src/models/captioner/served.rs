//! Captions by a model behind OpenAI's chat interface with pictures, as llama.cpp's server, Ollama and vLLM offer it.

mod address;
#[cfg(feature = "hub")]
mod client;
#[cfg(test)]
#[cfg(feature = "hub")]
mod tests;

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

pub use self::address::ServerAddress;
use crate::image::{RgbImage, data_url};
use crate::models::captioner::Describes;
use crate::util::caption_problem::CaptionProblem;
use crate::{Error, Result};

/// How long an answer may take: a vision model without a GPU needs minutes for two pictures, and a server may load it first.
const PATIENCE: Duration = Duration::from_secs(20 * 60);
/// The waits before a server that fails is asked again.
const WAITS: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(9),
];
/// The bound of an answer in tokens, for two captions as JSON.
const MOST_TOKENS: usize = 400;
/// The bound of a caption in words. CLIP reads 77 tokens.
const MOST_WORDS: usize = 60;

/// What a caption is, for both requests. What no caption names is free to change in B′.
const STYLE: &str = "one plain sentence of at most 25 words that names the subject, its colours, the place, the light \
    and the style of the picture; it begins with the subject itself, never with words such as \"The image shows\"";

/// A server that writes captions.
#[derive(Clone, PartialEq)]
pub struct ServedCaptioner {
    address: ServerAddress,
    key: Option<String>,
    /// How long an answer may take.
    patience: Duration,
    waits: [Duration; 3],
}

impl fmt::Debug for ServedCaptioner {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServedCaptioner")
            .field("address", &self.address)
            .field("key", &self.key.as_ref().map(|_| "…"))
            .finish_non_exhaustive()
    }
}

/// The captions of a pair as they are asked for.
#[derive(Deserialize)]
struct PairAnswer {
    before: String,
    after: String,
}

impl ServedCaptioner {
    /// The server at an address; it gets the key, if there is one, with every request.
    ///
    /// # Errors
    /// [`Error::Captioner`] for a key that cannot be sent.
    pub fn new(address: ServerAddress, key: Option<String>) -> Result<Self> {
        let served = Self {
            address,
            key: key.filter(|key| !key.is_empty()),
            patience: PATIENCE,
            waits: WAITS,
        };
        let is_sent = |key: &String| key.bytes().all(|byte| byte.is_ascii_graphic());
        match served.key.as_ref().is_none_or(is_sent) {
            true => Ok(served),
            false => Err(served.error(CaptionProblem::WrongKey)),
        }
    }

    /// Its address, with the model if it is known.
    pub fn address(&self) -> &ServerAddress {
        &self.address
    }

    /// The models that the server lists.
    ///
    /// # Errors
    /// [`Error::Captioner`] if it does not answer, or not with a list.
    pub fn models(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Model>,
        }
        #[derive(Deserialize)]
        struct Model {
            id: String,
        }
        let answer = self.ask("models", None)?;
        let models: Models = serde_json::from_slice(&answer)
            .map_err(|_| self.unreadable("a list of models", &answer))?;
        Ok(models.data.into_iter().map(|model| model.id).collect())
    }

    /// The same server with the model named: the only one that it has, if none is.
    ///
    /// # Errors
    /// As [`models`](Self::models), and if it has none or several.
    pub fn with_model(self) -> Result<Self> {
        if self.address.model().is_some() {
            return Ok(self);
        }
        let models = self.models()?;
        let problem = match models.as_slice() {
            [] => CaptionProblem::NoModel,
            [only] => {
                return Ok(Self {
                    address: self.address.with_model(only),
                    ..self
                });
            }
            [first, ..] => CaptionProblem::Several {
                example: self.address.with_model(first).to_string(),
                models,
            },
        };
        Err(self.error(problem))
    }

    /// The model's words about pictures; `schema` is that of the JSON it should write.
    fn say(&self, words: &str, pictures: &[&RgbImage], schema: Option<Value>) -> Result<String> {
        let named = self.clone().with_model()?;
        let mut content = vec![json!({ "type": "text", "text": words })];
        for picture in pictures {
            let url = data_url(picture)?;
            content.push(json!({ "type": "image_url", "image_url": { "url": url } }));
        }
        let mut request = json!({
            "model": named.address.model(),
            "messages": [{ "role": "user", "content": content }],
            "temperature": 0,
            "seed": 0,
            "max_tokens": MOST_TOKENS,
            "stream": false,
        });
        if let Some(schema) = schema {
            let schema = json!({ "name": "captions", "strict": true, "schema": schema });
            request["response_format"] = json!({ "type": "json_schema", "json_schema": schema });
        }
        let answer = named.ask("chat/completions", Some(&request))?;
        named.words_of(&answer)
    }

    /// The words of an answer.
    fn words_of(&self, answer: &[u8]) -> Result<String> {
        #[derive(Deserialize)]
        struct Answer {
            choices: Vec<Choice>,
        }
        #[derive(Deserialize)]
        struct Choice {
            message: Message,
            finish_reason: Option<String>,
        }
        #[derive(Deserialize)]
        struct Message {
            content: Option<String>,
        }
        let unreadable = || self.unreadable("an answer of the chat interface", answer);
        let parsed: Answer = serde_json::from_slice(answer).map_err(|_| unreadable())?;
        let choice = parsed.choices.into_iter().next().ok_or_else(unreadable)?;
        let words = choice.message.content.unwrap_or_default();
        if choice.finish_reason.as_deref() == Some("length") {
            let begins = beginning(&words);
            let tokens = MOST_TOKENS;
            return Err(self.error(CaptionProblem::Endless { tokens, begins }));
        }
        Ok(words)
    }

    /// A caption out of a model's words.
    fn tidy(&self, words: &str) -> Result<String> {
        let caption = tidied(words);
        let words = caption.split(' ').count();
        let problem = match words {
            _ if caption.is_empty() => CaptionProblem::Empty,
            _ if words > MOST_WORDS => CaptionProblem::TooLong {
                words,
                most: MOST_WORDS,
                begins: beginning(&caption),
            },
            _ => return Ok(caption),
        };
        Err(self.error(problem))
    }

    fn unreadable(&self, expected: &'static str, answer: &[u8]) -> Error {
        let begins = beginning(&String::from_utf8_lossy(answer));
        self.error(CaptionProblem::Unreadable { expected, begins })
    }

    fn error(&self, problem: CaptionProblem) -> Error {
        Error::Captioner {
            address: self.address.base().to_owned(),
            problem,
        }
    }

    #[cfg(not(feature = "hub"))]
    fn ask(&self, _: &str, _: Option<&Value>) -> Result<Vec<u8>> {
        Err(self.error(CaptionProblem::NotBuiltIn))
    }
}

impl Describes for ServedCaptioner {
    fn caption(&self, picture: &RgbImage) -> Result<String> {
        let words =
            format!("Write a caption of this picture: {STYLE}. Answer with the sentence alone.");
        self.tidy(&self.say(&words, &[picture], None)?)
    }

    /// Shows both in one request, so that the model describes what is the same in the same words.
    fn caption_pair(&self, before: &RgbImage, after: &RgbImage) -> Result<[String; 2]> {
        let words = format!(
            "The second picture is the first one after an edit. Write a caption of each: {STYLE}. Describe whatever is \
             the same in both pictures in the same words, so that the captions differ in the edit alone. Answer with a \
             JSON object of two strings: \"before\" is the caption of the first picture, \"after\" that of the second."
        );
        let schema = json!({
            "type": "object",
            "properties": { "before": { "type": "string" }, "after": { "type": "string" } },
            "required": ["before", "after"],
            "additionalProperties": false,
        });
        let said = self.say(&words, &[before, after], Some(schema))?;
        if said.trim().is_empty() {
            return Err(self.error(CaptionProblem::Empty));
        }
        let pair: PairAnswer = serde_json::from_str(inside_fence(&said)).map_err(|_| {
            self.unreadable("a JSON object with `before` and `after`", said.as_bytes())
        })?;
        Ok([self.tidy(&pair.before)?, self.tidy(&pair.after)?])
    }
}

/// The JSON object in a model's words, which may stand in a code fence and between other words.
fn inside_fence(said: &str) -> &str {
    match (said.find('{'), said.rfind('}')) {
        (Some(start), Some(end)) if start < end => &said[start..=end],
        _ => said,
    }
}

/// A caption in one line, without quotation marks, a full stop, or words about there being a picture.
fn tidied(words: &str) -> String {
    let plain = words.replace(|c: char| c.is_control(), " ");
    let quotes = ['"', '\'', '`', '“', '”'];
    let plain = plain.trim().trim_matches(quotes).trim_end_matches('.');
    let words: Vec<&str> = plain.trim_matches(quotes).split_whitespace().collect();
    let is_about_pictures = match words.as_slice() {
        [the, picture, shows, _, ..] => {
            let is = |word: &str, among: &[&str]| among.contains(&word.to_lowercase().as_str());
            is(the, &["the", "this"])
                && is(picture, &["image", "picture", "photo", "photograph"])
                && is(
                    shows,
                    &[
                        "shows", "depicts", "displays", "features", "portrays", "captures",
                    ],
                )
        }
        _ => false,
    };
    words[if is_about_pictures { 3 } else { 0 }..].join(" ")
}

/// How a text begins, in one line.
fn beginning(text: &str) -> String {
    const SHOWN: usize = 80;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let begins: String = line.chars().take(SHOWN).collect();
    match begins.len() < line.len() {
        true => begins + "…",
        false => begins,
    }
}
