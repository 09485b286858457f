//! `dinv models list`: models on disk and models that can be downloaded.

use std::path::PathBuf;

use clap::Args;
use difference_inversion::diffusion::family;
use difference_inversion::hub::{self, CachedModel, Hub, ModelId, licence};
use serde::Serialize;

use crate::cli::locate::{self, DEMO, Location};
use crate::cli::terminal;

/// List the models on this machine and those with a short name
#[derive(Debug, Args)]
#[command(after_help = "Example:
  dinv models list")]
pub(crate) struct ListArgs {
    /// Print the list as one JSON object
    #[arg(long)]
    json: bool,
}

/// A model.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// The name to type.
    pub(crate) name: String,
    /// Its name on the Hub.
    pub(crate) id: Option<String>,
    pub(crate) state: State,
    folder: Option<PathBuf>,
    /// Its bytes on this machine.
    pub(crate) bytes: u64,
    /// The approximate bytes of the whole download, if known.
    download_bytes: Option<u64>,
    /// Files missing from an incomplete copy.
    missing: Vec<String>,
    pub(crate) licence: Option<String>,
}

impl Row {
    /// Its bytes on this machine, or the approximate bytes of its whole download.
    #[cfg(feature = "serve")]
    pub(crate) fn bytes_in_all(&self) -> u64 {
        match self.state {
            State::NotDownloaded | State::Incomplete => self.download_bytes.unwrap_or(0),
            State::Complete => self.bytes,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    Complete,
    Incomplete,
    NotDownloaded,
}

/// Lists the models.
pub(crate) fn run(args: &ListArgs) -> anyhow::Result<()> {
    let hub = Hub::from_env()?;
    let rows = all(&hub)?;
    if args.json {
        return terminal::json(&serde_json::json!({ "cache": hub.cache, "models": rows }));
    }
    let width = rows.iter().map(|row| row.name.chars().count()).max();
    let width = width.unwrap_or(0).max("MODEL".len());
    let short = rows.iter().filter_map(|row| {
        let id = row.id.as_deref().filter(|id| *id != row.name)?;
        Some((row.name.as_str(), id))
    });
    terminal::line(format_args!(
        "{:<width$} {:>9}  {:<14}  LICENCE",
        "MODEL", "SIZE", "STATE"
    ))?;
    for row in &rows {
        let size = match (row.state, row.download_bytes) {
            (State::NotDownloaded, Some(bytes)) => about(bytes),
            _ => terminal::size(row.bytes),
        };
        let state = match row.state {
            State::Complete => "complete".to_owned(),
            State::Incomplete => "incomplete".to_owned(),
            State::NotDownloaded => "not downloaded".to_owned(),
        };
        let licence = row.licence.as_deref().unwrap_or("licence not stated");
        terminal::line(format_args!(
            "{:<width$} {size:>9}  {state:<14}  {licence}",
            row.name
        ))?;
        for file in &row.missing {
            terminal::line(format_args!("  missing: {file}"))?;
        }
    }
    terminal::line("")?;
    for (name, id) in short {
        terminal::line(format_args!("{name:<width$}  {id}"))?;
    }
    terminal::line(format_args!("{:<width$}  {}", "cache", hub.cache.display()))?;
    terminal::line("")?;
    terminal::line("~ is the size of the download; `dinv models pull MODEL` starts it.")
}

/// An approximate size.
fn about(bytes: u64) -> String {
    let tenths = bytes.div_ceil(100_000_000);
    format!("~{}.{} GB", tenths / 10, tenths % 10)
}

/// Every model on this machine or with a short name.
pub(crate) fn all(hub: &Hub) -> anyhow::Result<Vec<Row>> {
    rows(locate::demo().ok().as_ref(), hub.list()?)
}

/// The demo model, the models with a short name, and everything else in the cache.
fn rows(demo: Option<&Location>, mut cached: Vec<CachedModel>) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut of_hub = |name: &str, id: &ModelId, bytes: Option<u64>, licence: Option<String>| {
        let found = cached.iter().position(|model| model.id == *id);
        match found.map(|index| cached.remove(index)) {
            Some(model) => row(name.to_owned(), model, bytes),
            None => Row {
                name: name.to_owned(),
                id: Some(id.to_string()),
                state: State::NotDownloaded,
                folder: None,
                bytes: 0,
                download_bytes: bytes,
                missing: Vec::new(),
                licence,
            },
        }
    };
    let licence_of_demo = Some(env!("CARGO_PKG_LICENSE").to_owned());
    match demo {
        Some(Location::Disk(folder)) => {
            let missing = hub::missing(folder, None);
            rows.push(Row {
                name: DEMO.to_owned(),
                id: None,
                state: state(&missing),
                folder: Some(folder.to_owned()),
                bytes: hub::size(folder),
                download_bytes: None,
                missing,
                licence: licence_of_demo,
            });
        }
        Some(Location::Hub(id)) => {
            rows.push(of_hub(DEMO, id, None, licence_of_demo));
        }
        None => {}
    }
    for short in family::known_models() {
        let id: ModelId = short.repository.parse()?;
        let licence = licence(None, id.repository());
        rows.push(of_hub(short.name, &id, Some(short.bytes), licence));
    }
    rows.extend(
        cached
            .into_iter()
            .map(|model| row(model.id.to_string(), model, None)),
    );
    Ok(rows)
}

fn row(name: String, model: CachedModel, download_bytes: Option<u64>) -> Row {
    Row {
        name,
        state: state(&model.missing),
        licence: licence(Some(&model.folder), model.id.repository()),
        id: Some(model.id.to_string()),
        folder: Some(model.folder),
        bytes: model.bytes,
        download_bytes,
        missing: model.missing,
    }
}

fn state(missing: &[String]) -> State {
    match missing {
        [] => State::Complete,
        _ => State::Incomplete,
    }
}
