//! Where the demo model and its example pictures are.

use std::env;
use std::path::{Path, PathBuf};

use super::report::Failure;

/// The variable that names another place for the demo model.
const VARIABLE: &str = "DINV_DEMO_MODEL";

/// The folder of the demo model: the one `DINV_DEMO_MODEL` names, or the first that exists of those
/// beside the program and in the sources it was built from.
pub(crate) fn demo_model() -> anyhow::Result<PathBuf> {
    if let Some(folder) = env::var_os(VARIABLE).map(PathBuf::from) {
        if is_model(&folder) {
            return Ok(folder);
        }
        let message = format!(
            "{VARIABLE} names {}, which is not a model folder",
            folder.display()
        );
        return Err(Failure::new(message)
            .hint("it should hold a model_index.json")
            .into());
    }
    let places = demo_places();
    if let Some(folder) = places.iter().find(|folder| is_model(folder)) {
        return Ok(folder.clone());
    }
    let places: Vec<String> = places
        .iter()
        .map(|place| place.display().to_string())
        .collect();
    let failure = Failure::new(format!(
        "the demo model was not found; looked in {}",
        places.join(", ")
    ));
    Err(failure
        .hint(format!(
            "name a diffusers folder with `--model`, or the demo's with {VARIABLE}"
        ))
        .into())
}

/// The places looked in when `DINV_DEMO_MODEL` is not set.
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
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model");
    beside_program
        .into_iter()
        .flatten()
        .chain([sources])
        .collect()
}

fn is_model(folder: &Path) -> bool {
    folder.join("model_index.json").is_file()
}

/// The pictures of the built-in example, beside the demo model.
pub(crate) struct Example {
    pub(crate) a: PathBuf,
    pub(crate) a_prime: PathBuf,
    pub(crate) b: PathBuf,
}

/// The built-in example: `images/{a,a_prime,b}.png` beside the demo model's folder.
pub(crate) fn example() -> anyhow::Result<Example> {
    let model = demo_model()?;
    let images = model.parent().unwrap_or(Path::new("..")).join("images");
    let picture = |name: &str| -> anyhow::Result<PathBuf> {
        let path = images.join(name);
        if path.is_file() {
            return Ok(path);
        }
        let failure = Failure::new(format!(
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
