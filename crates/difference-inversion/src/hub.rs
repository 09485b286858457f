//! Models from the Hugging Face Hub: a name in, a local folder out.
//!
//! Downloads go to the cache of Python's `huggingface_hub` (`models--OWNER--NAME` with `blobs`, `refs`
//! and `snapshots`), so each finds what the other has fetched. Only files that this library reads are
//! fetched. A snapshot appears once all of its files are there.

mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
mod id;
mod known;
#[cfg(feature = "hub")]
mod partial;
mod plan;

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

pub use self::cache::{CachedModel, model_of, repository_of, size};
pub use self::id::ModelId;
pub use self::known::{CAPTIONER, joint_spaces, licence};
pub use self::plan::missing;
use crate::models::text::tower::TowerKind;
pub use crate::util::hub_problem::HubProblem;
use crate::util::progress::Observer;
use crate::{Error, Result};

/// The address of the Hub, unless `HF_ENDPOINT` overrides it.
const ENDPOINT: &str = "https://huggingface.co";

/// Which parts of a model are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// The variant of its weights, such as `fp16`.
    pub variant: Option<&'a str>,
    /// Whether to leave out T5 if the family works without it.
    pub without_t5: bool,
    /// Whether to leave out the weights of the denoiser, since others replace them.
    pub without_denoiser: bool,
    /// The architectures and widths of text encoders whose weights are left out for the same reason.
    pub without_encoders: &'a [(TowerKind, usize)],
}

impl<'a> From<Option<&'a str>> for Wanted<'a> {
    /// All parts, in a variant if there is one.
    fn from(variant: Option<&'a str>) -> Self {
        Self {
            variant,
            ..Self::default()
        }
    }
}

/// The contents of a download, before it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// Bytes that are not in the cache. Files whose size the Hub does not state count as nothing.
    pub bytes: u64,
    /// The known joint spaces of the pipeline's text encoders, unless it has its own.
    pub joint_spaces: Vec<ModelId>,
    /// Whether the pipeline has a captioner.
    pub has_captioner: bool,
}

/// The Hub, and the cache on this machine.
#[derive(Clone)]
pub struct Hub {
    /// The address of the Hub, without a slash at the end.
    pub endpoint: String,
    /// The folder of the cache.
    pub cache: PathBuf,
    /// The user's token, sent to the endpoint and to no other host.
    pub token: Option<String>,
    /// Whether to avoid the network.
    pub offline: bool,
}

impl std::fmt::Debug for Hub {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .finish()
    }
}

impl Hub {
    /// The Hub as the environment describes it, in `huggingface_hub`'s variables:
    ///
    /// | variable | meaning |
    /// |---|---|
    /// | `HF_HUB_CACHE` | the cache; else `$HF_HOME/hub`, else `~/.cache/huggingface/hub` |
    /// | `HF_TOKEN` | the token; else the file `HF_TOKEN_PATH`, else `$HF_HOME/token` |
    /// | `HF_ENDPOINT` | another address |
    /// | `HF_HUB_OFFLINE` | `1`, `on`, `yes` or `true`: avoid the network |
    ///
    /// # Errors
    /// [`Error::Missing`] if there is neither one of these variables nor a home folder.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
        let path = |name: &str| variable(name).map(|value| expanded(value, &variable));
        let home = || {
            let caches = path("XDG_CACHE_HOME");
            let caches = caches.or_else(|| Some(env::home_dir()?.join(".cache")));
            let default = || caches.map(|folder| folder.join("huggingface"));
            path("HF_HOME").or_else(default)
        };
        let cache = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]
            .into_iter()
            .find_map(path)
            .or_else(|| Some(home()?.join("hub")))
            .ok_or_else(|| Error::Missing {
                what: "a place for downloaded models".to_owned(),
                reason: "there is no home folder; name one with HF_HOME".to_owned(),
            })?;
        let token_file = || path("HF_TOKEN_PATH").or_else(|| Some(home()?.join("token")));
        let token = text("HF_TOKEN")
            .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| std::fs::read_to_string(token_file()?).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let offline = text("HF_HUB_OFFLINE").or_else(|| text("TRANSFORMERS_OFFLINE"));
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache,
            token,
            offline: offline.is_some_and(|value| {
                ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
            }),
        })
    }

    /// The folder of a repository's snapshot, if `folder` is that repository's folder in the cache:
    /// `models--OWNER--NAME`.
    pub fn snapshot_in(folder: &std::path::Path) -> Option<PathBuf> {
        cache::snapshot_in(folder)
    }

    /// The wanted parts of a model in the cache.
    pub fn cached<'a>(&self, id: &ModelId, wanted: impl Into<Wanted<'a>>) -> Option<CachedModel> {
        cache::RepoCache::new(&self.cache, id).model(id, wanted.into())
    }

    /// Every usable model in the cache, by name.
    ///
    /// # Errors
    /// [`Error::Io`] if the cache cannot be read; a missing cache is empty.
    pub fn list(&self) -> Result<Vec<CachedModel>> {
        cache::list(&self.cache)
    }

    /// Downloads the current commit of a model's revision into the cache: the missing files, resuming an
    /// earlier download, with weights in the `wanted` variant if there are any. Returns its folder.
    ///
    /// # Errors
    /// [`Error::Hub`] with the reason, [`Error::Io`] if the cache cannot be written,
    /// [`Error::Stopped`] if the observer asks to stop. Downloaded data is kept, and an incomplete
    /// snapshot is never left.
    #[cfg(feature = "hub")]
    pub fn pull<'a>(
        &self,
        id: &ModelId,
        wanted: impl Into<Wanted<'a>>,
        observer: Observer<'_>,
    ) -> Result<PathBuf> {
        let wanted = wanted.into();
        self.online(id, wanted)?;
        download::pull(self, id, wanted, observer)
    }

    /// Reports that this build cannot download.
    ///
    /// # Errors
    /// [`Error::Hub`], always.
    #[cfg(not(feature = "hub"))]
    pub fn pull<'a>(
        &self,
        id: &ModelId,
        wanted: impl Into<Wanted<'a>>,
        _: Observer<'_>,
    ) -> Result<PathBuf> {
        self.online(id, wanted.into())?;
        Err(HubProblem::NotBuiltIn.of(id))
    }

    /// What [`pull`](Self::pull) would download. Downloads no weights.
    ///
    /// # Errors
    /// As [`pull`](Self::pull).
    #[cfg(feature = "hub")]
    pub fn survey<'a>(
        &self,
        id: &ModelId,
        wanted: impl Into<Wanted<'a>>,
        observer: Observer<'_>,
    ) -> Result<Survey> {
        let wanted = wanted.into();
        self.online(id, wanted)?;
        download::survey(self, id, wanted, observer)
    }

    /// Reports that this build cannot download.
    ///
    /// # Errors
    /// [`Error::Hub`], always.
    #[cfg(not(feature = "hub"))]
    pub fn survey<'a>(
        &self,
        id: &ModelId,
        wanted: impl Into<Wanted<'a>>,
        _: Observer<'_>,
    ) -> Result<Survey> {
        self.online(id, wanted.into())?;
        Err(HubProblem::NotBuiltIn.of(id))
    }

    fn online(&self, id: &ModelId, wanted: Wanted<'_>) -> Result<()> {
        if !self.offline {
            return Ok(());
        }
        let missing = self.cached(id, wanted).map(|model| model.missing);
        let missing = missing.unwrap_or_default();
        Err(HubProblem::Offline { missing }.of(id))
    }
}

/// A path with `~`, `$NAME` and `${NAME}` expanded, as in Python's library: variables are not always set by
/// a shell.
fn expanded(path: OsString, variable: &impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let Some(text) = path.to_str() else {
        return PathBuf::from(path);
    };
    let home = || variable("HOME").map_or_else(env::home_dir, |home| Some(PathBuf::from(home)));
    let of_home: Option<(PathBuf, &str)> = match text.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => home().map(|home| (home, rest)),
        _ => None,
    };
    let text = match &of_home {
        Some((home, rest)) => format!("{}{rest}", home.display()),
        None => text.to_owned(),
    };
    let mut parts = text.split('$');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = match part.strip_prefix('{').and_then(|part| part.split_once('}')) {
            Some(named) => named,
            None => {
                let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
                part.split_at(part.find(|c| !is_of_name(c)).unwrap_or(part.len()))
            }
        };
        let value = (!name.is_empty()).then(|| variable(name)).flatten();
        match value.and_then(|value| value.into_string().ok()) {
            Some(value) => out += &(value + rest),
            None => out += &format!("${part}"),
        }
    }
    PathBuf::from(out)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        let find = |name: &str| {
            let mut all = variables.iter();
            all.find(|(key, _)| *key == name)
                .map(|(_, value)| OsString::from(value))
        };
        Hub::from_variables(find).unwrap()
    }

    #[test]
    fn the_variables_of_huggingface_hub_are_heeded() {
        let plain = hub(&[("XDG_CACHE_HOME", "/c")]);
        assert_eq!(plain.cache, Path::new("/c/huggingface/hub"));
        assert_eq!(plain.endpoint, ENDPOINT);
        assert!(!plain.offline && plain.token.is_none());
        let home = hub(&[("HF_HOME", "/h"), ("HF_ENDPOINT", "http://mirror/")]);
        assert_eq!(home.cache, Path::new("/h/hub"));
        assert_eq!(home.endpoint, "http://mirror");
        let both = hub(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/x")]);
        assert_eq!(both.cache, Path::new("/x"));
        for (value, expected) in [("1", true), ("True", true), ("0", false), ("no", false)] {
            let hub = hub(&[("HF_HOME", "/h"), ("HF_HUB_OFFLINE", value)]);
            assert_eq!(hub.offline, expected, "{value}");
        }
    }

    #[test]
    fn home_and_variables_in_paths_are_replaced() {
        for (value, expected) in [
            ("~/.cache/hf", "/home/me/.cache/hf/hub"),
            ("~", "/home/me/hub"),
            ("$HOME/hf", "/home/me/hf/hub"),
            ("${HOME}x/$DATA", "/home/mex/big disk/hub"),
            ("/a/~/$NOWHERE", "/a/~/$NOWHERE/hub"),
            ("~other/x$", "~other/x$/hub"),
        ] {
            let variables = [
                ("HOME", "/home/me"),
                ("DATA", "big disk"),
                ("HF_HOME", value),
            ];
            assert_eq!(hub(&variables).cache, Path::new(expected), "{value}");
        }
        let direct = hub(&[
            ("HOME", "/h"),
            ("HF_HUB_CACHE", "$HOME/x"),
            ("HF_HOME", "/y"),
        ]);
        assert_eq!(direct.cache, Path::new("/h/x"));
    }

    #[test]
    fn the_token_is_found_and_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "hf_secret\n").unwrap();
        let home = folder.path().to_str().unwrap();
        let from_file = hub(&[("HF_HOME", home)]);
        assert_eq!(from_file.token.as_deref(), Some("hf_secret"));
        assert!(!format!("{from_file:?}").contains("secret"));
        let given = hub(&[("HF_HOME", home), ("HF_TOKEN", "hf_other")]);
        assert_eq!(given.token.as_deref(), Some("hf_other"));
    }
}
