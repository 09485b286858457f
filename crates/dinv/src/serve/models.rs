//! The models that a request may name, and what they need.

use std::collections::HashSet;
use std::path::PathBuf;

use difference_inversion::hub::Hub;
use serde_json::{Value, json};

use crate::cli::consent::free_space;
use crate::cli::device::Place;
use crate::cli::flags::ModelSettings;
use crate::cli::models::list::{self, Row, State};
use crate::cli::{fetch, memory};

use super::http::App;
use super::problem::{Answer, Problem};

/// The settings that [`check`] restricts: they can name paths and addresses.
pub(crate) const RESTRICTED: [&str; 2] = ["model", "captioner"];

/// All models, with the memory of learning on each, and the room on this machine, for which the process `waiting` makes way.
pub(crate) fn all(waiting: Option<u32>) -> Answer<Value> {
    let hub = Hub::from_env()?;
    let models: Vec<Value> = list::all(&hub)?.iter().map(view).collect();
    let mut all = json!({ "models": models });
    if let Some(free) = free_space(&hub.cache) {
        all["disk"] = json!({ "free": free });
    }
    // The estimates are for the processor's memory.
    if Place::named("auto")?.name == "cpu" {
        all["memory"] = json!({ "available": memory::available_with(waiting) });
    }
    Ok(all)
}

fn view(model: &Row) -> Value {
    let mut view = json!({ "name": model.name, "on_disk": model.state == State::Complete });
    let mut add = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            view[name] = value;
        }
    };
    let bytes = model.bytes_in_all();
    add("bytes", (bytes > 0).then(|| json!(bytes)));
    add("title", model.id.as_ref().map(|id| json!(id)));
    add(
        "licence",
        model.licence.as_ref().map(|licence| json!(licence)),
    );
    let ways = ways(model)
        .into_iter()
        .map(|way| json!({ "dtype": way.dtype, "memory": way.memory, "bytes": way.peak << 20 }));
    let ways: Vec<Value> = ways.collect();
    add("learning", (!ways.is_empty()).then(|| json!(ways)));
    view
}

/// The memory of learning on a model, if it is known.
fn ways(model: &Row) -> Vec<memory::Way> {
    if model.state != State::Complete {
        return memory::ways_of_known(&model.name, None);
    }
    let settings = ModelSettings {
        model: Some(PathBuf::from(&model.name)),
        ..ModelSettings::default()
    };
    let found = fetch::on_disk(&settings).and_then(|(paths, _)| Ok((paths.files()?, paths)));
    match found {
        Ok((files, paths)) if fetch::learns(&files) => memory::ways(&paths),
        _ => Vec::new(),
    }
}

/// Allows only models that the server offers as a [`RESTRICTED`] setting, unless any may be named. The address of
/// another server is none of them: a request could make this one send pictures to places that only it can reach.
pub(crate) fn check(app: &App, setting: &str, model: &Value) -> Answer<()> {
    let field = format!("settings.{setting}");
    let Some(name) = model.as_str() else {
        return Err(Problem::field(field, format!("{setting}: expected a text")));
    };
    if app.options.allow_any_model {
        return Ok(());
    }
    let models = list::all(&Hub::from_env()?)?.into_iter();
    let known: HashSet<String> = models.map(|model| model.name).collect();
    // A folder of that name in the server's folder would be another model.
    if known.contains(name) {
        return Ok(());
    }
    Err(
        Problem::field(field, format!("the server does not offer the {setting} `{name}`")).hint(
            "`GET /v1/models` lists its models; `dinv serve --allow-any-model` lets requests name others",
        ),
    )
}
