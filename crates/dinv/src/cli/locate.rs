//! The models that names stand for, and the paths of the demo model and its example pictures.

use std::env;
use std::path::{Path, PathBuf};

use difference_inversion::diffusion::family::{self, KnownModel};
use difference_inversion::diffusion::model_files::MODEL_INDEX;
use difference_inversion::hub::{self, Hub, ModelId};
use difference_inversion::models::captioner::ServerAddress;

use super::terminal::Failure;

/// The variable with the demo model: a folder, or where it is published on the Hub, with [`ON_HUB`] in front. If that was
/// set while the program was built, a program without its sources takes the model from there.
pub(crate) const VARIABLE: &str = "DINV_DEMO_MODEL";
const BUILT_WITH: Option<&str> = option_env!("DINV_DEMO_MODEL");
/// The sources of this program. A release, which is built with `DINV_WITHOUT_SOURCES`, is not to find those of another
/// machine.
const SOURCES: Option<&str> = match option_env!("DINV_WITHOUT_SOURCES") {
    Some(_) => None,
    None => Some(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")),
};
pub(crate) const ON_HUB: &str = "hf://";

/// The short name of the demo model.
pub(crate) const DEMO: &str = "demo";

/// The suite of photographs, and its folder's name.
pub(crate) const PHOTOS: &str = "photos";

/// The location of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Location {
    /// A folder or file that exists.
    Disk(PathBuf),
    /// A model of the Hub, downloaded or not.
    Hub(ModelId),
}

/// The location that a name stands for: an existing path, else a short name, else a model of the Hub. A
/// folder without a model does not hide a short name.
pub(crate) fn locate(name: &Path) -> anyhow::Result<Location> {
    let text = name.to_string_lossy();
    if let Some(folder) = meant_by(name) {
        return Ok(Location::Disk(folder));
    }
    let id = name_of(&text);
    let is_short = text == DEMO || short_name(&text).is_some();
    if name.is_file() || is_model(name) || (name.exists() && !is_short) {
        return Ok(Location::Disk(name.to_owned()));
    }
    if text == DEMO {
        return demo();
    }
    if let Some(id) = id {
        return Ok(Location::Hub(id));
    }
    Err(
        Failure::input(format!("{text}: no such file, folder or model"))
            .hint(hint(&text))
            .into(),
    )
}

/// A hint about an unknown name.
pub(crate) fn hint(text: &str) -> String {
    let known = || std::iter::once(DEMO).chain(family::known_models().map(|model| model.name));
    match nearest(text, known()) {
        Some(name) => format!("did you mean `{name}`?"),
        None => format!(
            "give a folder, a model of the Hub (OWNER/NAME), or one of {}",
            known().collect::<Vec<_>>().join(", ")
        ),
    }
}

/// The short name that a text resembles, such as `sd15` for `SD 1.5` and `stable-diffusion-1-5`.
fn nearest<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = text.to_lowercase().replace("stable-diffusion", "sd");
    let plain: String = plain.chars().filter(|c| c.is_alphanumeric()).collect();
    let digits = |text: &str| {
        text.chars()
            .filter(char::is_ascii_digit)
            .collect::<String>()
    };
    // Paths are taken literally, and a different number is a different model.
    let is_near = |name: &&str| {
        !text.contains(['/', '\\'])
            && digits(name) == digits(&plain)
            && strsim::levenshtein(name, &plain) <= 1
    };
    let mut near: Vec<&str> = names.filter(is_near).collect();
    near.sort_by_key(|name| strsim::levenshtein(name, &plain));
    match near.as_slice() {
        [only] => Some(only),
        [first, ..] if *first == plain => Some(first),
        _ => None,
    }
}

/// The model folder that a path stands for, if the path is inside it or inside a cache of the Hub.
fn meant_by(path: &Path) -> Option<PathBuf> {
    let is_index = path.file_name().is_some_and(|name| name == MODEL_INDEX);
    if is_index && path.is_file() {
        let above = path.parent().filter(|above| *above != Path::new(""));
        return Some(above.unwrap_or(Path::new(".")).to_owned());
    }
    let name = path.file_name()?.to_str()?;
    hub::repository_of(name)?;
    Hub::snapshot_in(path)
}

/// The model of the Hub that a name stands for, if any. The name may also be the address of its page or
/// its folder in a cache.
pub(crate) fn name_of(text: &str) -> Option<ModelId> {
    let addresses = [
        "https://huggingface.co/",
        "https://hf.co/",
        "huggingface.co/",
        "hf.co/",
    ];
    let copied = addresses.iter().find_map(|start| text.strip_prefix(start));
    let id = copied.unwrap_or(text).trim_end_matches('/').parse().ok();
    short_name(text).or(id).or_else(|| hub::repository_of(text))
}

/// The server that a captioner is named by, if it is no folder and no model of the Hub.
pub(crate) fn server(name: &Path) -> anyhow::Result<Option<ServerAddress>> {
    let text = name.to_string_lossy();
    if name_of(&text).is_some() || name.exists() {
        return Ok(None);
    }
    if !is_address(&text) {
        let host = text.split('/').next().unwrap_or_default();
        let port = host.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        return match port {
            Some(Ok(_)) => {
                let message = format!("--captioner: `{text}` is neither a folder nor an address");
                Err(Failure::usage(message)
                    .hint(format!("write http://{text}"))
                    .into())
            }
            _ => Ok(None),
        };
    }
    let address: ServerAddress = text.parse()?;
    if ["huggingface.co", "hf.co"].contains(&address.host()) {
        let message = format!("--captioner: {text} is a page of the Hub and names no model");
        return Err(Failure::usage(message).hint("give OWNER/NAME").into());
    }
    Ok(Some(address))
}

/// Whether a text is the address of something on a network.
pub(crate) fn is_address(text: &str) -> bool {
    text.contains("://")
}

/// The model that a short name, with or without a revision, stands for.
fn short_name(text: &str) -> Option<ModelId> {
    let name = text.split('@').next()?;
    let short = family::known_models().find(|model| model.name == name)?;
    text.replacen(name, short.repository, 1).parse().ok()
}

/// The model that is known by the name or by the repository that was typed, at any revision.
pub(crate) fn known(model: &Path) -> Option<&'static KnownModel> {
    let Ok(Location::Hub(id)) = locate(model) else {
        return None;
    };
    let text = id.to_string();
    let repository = text.split('@').next()?;
    family::known_models().find(|model| model.repository == repository)
}

/// What to type for a model of the Hub: its short name, if it has one.
pub(crate) fn called(id: &ModelId) -> String {
    let text = id.to_string();
    let short = family::known_models().find(|model| model.repository == text);
    short.map_or(text, |model| model.name.to_owned())
}

/// The meaning of a name in a settings file in `folder`: paths are relative to it.
pub(crate) fn relative_to(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    let is_name = name == DEMO || is_address(name) || name_of(name).is_some();
    if is_name && !path.exists() {
        PathBuf::from(name)
    } else {
        path
    }
}

/// The location of the demo model: the one that `DINV_DEMO_MODEL` names, or the first existing folder next to the program
/// and in the sources it was built from, or where it is published.
pub(crate) fn demo() -> anyhow::Result<Location> {
    if let Some(named) = env::var_os(VARIABLE).map(PathBuf::from) {
        if is_model(&named) {
            return Ok(Location::Disk(named));
        }
        if let Some(name) = named.to_str().and_then(|name| name.strip_prefix(ON_HUB)) {
            return Ok(Location::Hub(name.parse()?));
        }
        let message = format!(
            "{VARIABLE} names {}, which is not a model folder",
            named.display()
        );
        return Err(Failure::input(message)
            .hint(
                "it should hold a model_index.json; a model of the Hub is written hf://OWNER/NAME",
            )
            .into());
    }
    let places = demo_places();
    if let Some(folder) = places.iter().find(|folder| is_model(folder)) {
        return Ok(Location::Disk(folder.clone()));
    }
    if let Some(name) = BUILT_WITH.and_then(|name| name.strip_prefix(ON_HUB)) {
        return Ok(Location::Hub(name.parse()?));
    }
    let places: Vec<String> = places
        .iter()
        .map(|place| place.display().to_string())
        .collect();
    let failure = Failure::input(format!(
        "the demo model was not found; looked in {}",
        places.join(", ")
    ));
    Err(failure
        .hint(format!(
            "keep the folder `demo`, which the sources and the releases have, next to the program, or name its `model` with \
             {VARIABLE}; or name another model with `--model`"
        ))
        .into())
}

/// The folder of the demo model, see [`demo`].
pub(crate) fn demo_model() -> anyhow::Result<PathBuf> {
    let id = match demo()? {
        Location::Disk(folder) => return Ok(folder),
        Location::Hub(id) => id,
    };
    let cached = Hub::from_env()?.cached(&id, None);
    match cached.filter(|model| model.missing.is_empty()) {
        Some(model) => Ok(model.folder),
        None => Err(
            Failure::input(format!("the demo model, {id}, is not downloaded"))
                .hint("download it with `dinv models pull demo`")
                .into(),
        ),
    }
}

/// The places searched if `DINV_DEMO_MODEL` is not set.
fn demo_places() -> Vec<PathBuf> {
    let beside_program = env::current_exe().ok().and_then(|program| {
        let folder = program
            .canonicalize()
            .unwrap_or(program)
            .parent()?
            .to_owned();
        Some([
            folder.join("demo/model"),
            folder.join("../share/dinv/demo/model"),
        ])
    });
    let sources = SOURCES.map(|sources| {
        let model = Path::new(sources).join("demo/model");
        model.canonicalize().unwrap_or(model)
    });
    beside_program
        .into_iter()
        .flatten()
        .chain(sources)
        .collect()
}

fn is_model(folder: &Path) -> bool {
    folder.join(MODEL_INDEX).is_file()
}

/// The folder of the suites and their judge, next to the demo model.
pub(crate) fn benchmark() -> anyhow::Result<PathBuf> {
    let model = demo_model()?;
    Ok(model.parent().unwrap_or(Path::new("..")).join("benchmark"))
}

/// The suite in a folder of [`benchmark`].
pub(crate) fn suite(folder: &str) -> anyhow::Result<PathBuf> {
    let path = benchmark()?.join(folder);
    if path.is_dir() {
        return Ok(path);
    }
    let message = format!("{}: the suite is missing", path.display());
    let hint = format!("copy the folder demo/benchmark next to demo/model, which {VARIABLE} names");
    Err(Failure::input(message).hint(hint).into())
}

/// The pictures of the built-in example.
pub(crate) struct Example {
    pub(crate) a: PathBuf,
    pub(crate) a_prime: PathBuf,
    pub(crate) b: PathBuf,
}

/// The built-in example: `images/{a,a_prime,b}.png` next to the demo model's folder, or in it.
pub(crate) fn example() -> anyhow::Result<Example> {
    let model = demo_model()?;
    let beside = model.parent().unwrap_or(Path::new("..")).join("images");
    let images = match beside.is_dir() {
        true => beside,
        false => model.join("images"),
    };
    let picture = |name: &str| -> anyhow::Result<PathBuf> {
        let path = images.join(name);
        if path.is_file() {
            return Ok(path);
        }
        let failure = Failure::input(format!(
            "{}: the example picture is missing",
            path.display()
        ));
        Err(failure
            .hint("give your own with `--a`, `--a-prime` and `--b`")
            .into())
    };
    Ok(Example {
        a: picture("a.png")?,
        a_prime: picture("a_prime.png")?,
        b: picture("b.png")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(text: &str) -> Location {
        Location::Hub(text.parse().unwrap())
    }

    #[test]
    fn a_path_overrides_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("owner/name");
        std::fs::create_dir_all(&path).unwrap();
        assert_eq!(locate(&path).unwrap(), Location::Disk(path));
        let absent = folder.path().join("absent");
        let error = locate(&absent).unwrap_err().to_string();
        assert!(
            error.ends_with("absent: no such file, folder or model"),
            "{error}"
        );
    }

    #[test]
    fn a_model_may_be_called_by_what_a_cache_calls_it() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--a--b");
        let snapshot = folder.join("snapshots/c0ffee");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(folder.join("snapshots/beef")).unwrap();
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::write(folder.join("refs/main"), "c0ffee").unwrap();
        assert_eq!(locate(&folder).unwrap(), Location::Disk(snapshot.clone()));
        assert_eq!(locate(Path::new("models--a--b")).unwrap(), hub("a/b"));
        let index = snapshot.join(MODEL_INDEX);
        std::fs::write(&index, "{}").unwrap();
        assert_eq!(locate(&index).unwrap(), Location::Disk(snapshot));
    }

    #[test]
    fn names_stand_for_models_of_the_hub() {
        let sdxl = "stabilityai/stable-diffusion-xl-base-1.0";
        assert_eq!(locate(Path::new("sdxl")).unwrap(), hub(sdxl));
        assert_eq!(
            locate(Path::new("sdxl@v1")).unwrap(),
            hub(&format!("{sdxl}@v1"))
        );
        assert_eq!(locate(Path::new("a/b@main")).unwrap(), hub("a/b"));
        for page in ["https://huggingface.co/a/b", "hf.co/a/b/"] {
            assert_eq!(locate(Path::new(page)).unwrap(), hub("a/b"));
        }
        for name in ["sdxxl", "a/b/c"] {
            let error = locate(Path::new(name)).unwrap_err().to_string();
            assert_eq!(error, format!("{name}: no such file, folder or model"));
        }
    }

    #[test]
    fn models_are_called_by_their_short_names() {
        let called = |text: &str| called(&text.parse().unwrap());
        let sdxl = "stabilityai/stable-diffusion-xl-base-1.0";
        assert_eq!(called(sdxl), "sdxl");
        assert_eq!(called(&format!("{sdxl}@v1")), format!("{sdxl}@v1"));
        assert_eq!(called("owner/name"), "owner/name");
    }

    #[test]
    fn names_that_come_close_are_proposed() {
        for (typed, meant) in [
            ("sd1.5", "sd15"),
            ("SD15", "sd15"),
            ("stable-diffusion-1.5", "sd15"),
            ("sdxxl", "sdxl"),
            ("SDXL", "sdxl"),
            ("Demo", "demo"),
        ] {
            assert_eq!(hint(typed), format!("did you mean `{meant}`?"));
        }
        for typed in ["flux", "models/sdxl", "sd", "sd14"] {
            assert!(hint(typed).starts_with("give a folder"), "{}", hint(typed));
        }
    }

    #[test]
    fn names_in_a_settings_file_are_paths_relative_to_it_or_names() {
        let folder = tempfile::tempdir().unwrap();
        let relative = |name: &str| relative_to(folder.path(), name);
        assert_eq!(relative("sd15"), Path::new("sd15"));
        assert_eq!(relative("owner/name@rev"), Path::new("owner/name@rev"));
        assert_eq!(relative("../model"), folder.path().join("../model"));
        std::fs::create_dir(folder.path().join("sd15")).unwrap();
        assert_eq!(relative("sd15"), folder.path().join("sd15"));
    }
}
