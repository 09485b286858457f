//! The methods of a run, and their record.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;

use difference_inversion::Error;
use dinv_eval::suite::Entry;
use dinv_eval::{BUILT_IN, EvalModels, Folder, MethodRecord, Variant};
use serde_json::{Map, Value};

use super::super::terminal::Failure;

/// The name that stands for every method, built-in or from the file of variants.
const ALL: &str = "all";

/// The methods to run, in order.
pub(super) fn chosen(names: &[String], file: Option<&Path>) -> anyhow::Result<Vec<Variant>> {
    let known = file.map(read_variants).transpose()?.unwrap_or_default();
    let built_in = || BUILT_IN.iter().map(|method| Variant::plain(method.name));
    let chosen: Vec<Variant> = match (names, file) {
        ([], None) => built_in().collect(),
        ([], Some(_)) => known,
        (names, _) if names.iter().any(|name| name.trim() == ALL) => {
            if names.len() > 1 {
                let message = format!(
                    "--methods: `{ALL}` means every method and cannot be combined with others"
                );
                return Err(Failure::usage(message).into());
            }
            let named = |name: &str| known.iter().any(|variant| variant.name == name);
            let plain: Vec<Variant> = built_in().filter(|method| !named(&method.name)).collect();
            plain.into_iter().chain(known.iter().cloned()).collect()
        }
        (names, _) => (names.iter())
            .map(|name| {
                let mut all = known.iter().cloned().chain(built_in());
                all.find(|variant| variant.name == name.trim())
                    .ok_or_else(|| unknown_method(name, &known))
            })
            .collect::<Result<_, _>>()?,
    };
    let mut seen = HashSet::new();
    // Their folders are one where names ignore case.
    let mut is_new = |variant: &Variant| seen.insert(variant.name.to_lowercase());
    match chosen.iter().find(|variant| !is_new(variant)) {
        Some(twice) => {
            Err(Failure::usage(format!("the method `{}` is named twice", twice.name)).into())
        }
        None => Ok(chosen),
    }
}

fn unknown_method(name: &str, variants: &[Variant]) -> Failure {
    let variants = variants.iter().map(|variant| variant.name.as_str());
    let names: Vec<&str> = (BUILT_IN.iter().map(|method| method.name))
        .chain(variants)
        .collect();
    Failure::usage(format!("there is no method `{name}`"))
        .hint(format!("there are {}", names.join(", ")))
}

/// Reads a file of variants. What stands above its first section holds for every variant that does not set it.
fn read_variants(path: &Path) -> anyhow::Result<Vec<Variant>> {
    let wrong = |reason: &str| Failure::input(format!("{}: {reason}", path.display()));
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let entries: BTreeMap<String, Value> =
        toml::from_str(&text).map_err(|error| wrong(error.to_string().trim_end()))?;
    let mut shared = Map::new();
    let mut sections = Vec::new();
    for (name, value) in entries {
        match value {
            Value::Object(own) => sections.push((name, own)),
            value => drop(shared.insert(name, value)),
        }
    }
    let mut variants = Vec::new();
    for (name, own) in sections {
        let mut settings = shared.clone();
        settings.extend(own);
        Folder::check_method_name(&name).map_err(|error| wrong(&error.to_string()))?;
        if name == ALL {
            return Err(wrong("[all]: `all` stands for every method").into());
        }
        let method = match settings.remove("method") {
            Some(Value::String(method)) => method,
            None => name.clone(),
            Some(other) => {
                let reason = format!("[{name}]: `method`: expected a name, found {other}");
                return Err(wrong(&reason).into());
            }
        };
        if !BUILT_IN.iter().any(|known| known.name == method) {
            return Err(wrong(&format!("[{name}]: {}", unknown_method(&method, &[]))).into());
        }
        variants.push(Variant {
            name,
            method,
            settings,
        });
    }
    if variants.is_empty() {
        Err(wrong("there is no variant in it").into())
    } else {
        Ok(variants)
    }
}

/// The records of the methods. A method is skipped if its model is missing or unsuitable, or if no
/// analogy provides what it needs.
pub(super) fn records(
    variants: &[Variant],
    models: &EvalModels,
    entries: &[Entry],
) -> anyhow::Result<Vec<MethodRecord>> {
    let mut last = None; // keeps a model open that the next method shares
    let records = variants.iter().map(|variant| {
        let (name, method) = (variant.name.clone(), variant.method.clone());
        match dinv_eval::build(variant, models) {
            Ok(made) => {
                let told = made.told();
                let is_told = |entry: &Entry| {
                    let captions = entry.captions.clone().unwrap_or_default();
                    made.is_told(&captions, entry.instruction.as_deref())
                };
                let mute = !entries.is_empty() && !entries.iter().any(is_told);
                let record = MethodRecord {
                    name,
                    method,
                    told: Some(told),
                    settings: made.settings(),
                    skipped: mute.then(|| format!("no analogy provides what it needs: {told}")),
                };
                drop(last.replace(made));
                Ok(record)
            }
            Err(reason @ (Error::Missing { .. } | Error::WrongModel { .. })) => Ok(MethodRecord {
                name,
                method,
                told: None,
                settings: Value::Null,
                skipped: Some(reason.to_string()),
            }),
            Err(error) => Err(anyhow::Error::new(error).context(format!("the method `{name}`"))),
        }
    });
    records.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn all_are_those_that_are_built_in_and_those_of_the_file() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("v.toml");
        let text = "[mine]\nmethod = 'sdedit'\n[sdedit]\nstrength = 0.5\n";
        fs::write(&file, text).unwrap();
        let names = |names: &[&str], file: Option<&Path>| -> Vec<String> {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            let chosen = chosen(&names, file).unwrap();
            chosen.into_iter().map(|variant| variant.name).collect()
        };
        assert_eq!(names(&["all"], None), names(&[], None));
        assert_eq!(names(&[], Some(&file)), ["mine", "sdedit"]);
        // A variant named like a built-in method replaces it.
        let all = names(&["all"], Some(&file));
        assert_eq!(all.len(), BUILT_IN.len() + 1);
        assert_eq!(all[BUILT_IN.len() - 1..], ["mine", "sdedit"]);
        fs::write(&file, "[all]\nmethod = 'sdedit'\n").unwrap();
        let error = chosen(&[], Some(&file)).unwrap_err().to_string();
        assert!(
            error.contains("[all]: `all` stands for every method"),
            "{error}"
        );
        let beside_another = chosen(&["all".into(), "sdedit".into()], None);
        let error = beside_another.unwrap_err().to_string();
        assert!(
            error.contains("means every method and cannot be combined"),
            "{error}"
        );
    }

    #[test]
    fn settings_above_the_sections_hold_for_all() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("v.toml");
        let text = "steps = 5\nalpha = 0.5\n[image-delta]\n[long]\nmethod = 'no-clip'\nsteps = 9\n";
        fs::write(&path, text).unwrap();
        let read = read_variants(&path).unwrap();
        let found: Vec<_> = (read.into_iter())
            .map(|one| (one.name, one.method, Value::Object(one.settings)))
            .collect();
        let expected = [
            (
                "image-delta",
                "image-delta",
                json!({ "steps": 5, "alpha": 0.5 }),
            ),
            ("long", "no-clip", json!({ "steps": 9, "alpha": 0.5 })),
        ];
        let expected =
            expected.map(|(name, method, settings)| (name.into(), method.into(), settings));
        assert_eq!(found, expected);
    }
}
