//! Settings of methods by name, as in a file of variants.

use difference_inversion::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// The name of the seed in many settings; a run has its own.
const SEED: &str = "seed";

/// Returns `defaults` with the values of the named settings. Settings in groups, such as those of an
/// [`AnalogyConfig`](difference_inversion::method::generate_config::AnalogyConfig), are named without their group.
///
/// # Errors
/// [`Error::InvalidInput`] for an unknown name (the seed is the run's) and for an invalid value.
pub fn with_settings<T: Serialize + DeserializeOwned>(
    defaults: &T,
    values: &Map<String, Value>,
) -> Result<T> {
    let mut settings = object(defaults)?;
    for (name, value) in values {
        let place = match name.as_str() {
            SEED => None,
            _ => place_of(&mut settings, name),
        };
        let Some(place) = place else {
            let known = names(&settings).join(", ");
            let reason = format!("there is no setting `{name}`; there are {known}");
            return Err(Error::invalid_input(reason));
        };
        place.clone_from(value);
    }
    serde_path_to_error::deserialize(Value::Object(settings)).map_err(|error| {
        let path = error.path().to_string();
        let name = path.rsplit('.').next().unwrap_or(&path);
        Error::invalid_input(format!("setting `{name}`: {}", error.inner()))
    })
}

/// The settings as they are recorded: all but the seed.
pub(super) fn recorded(settings: &impl Serialize) -> Value {
    let mut settings = object(settings).unwrap_or_default();
    settings.remove(SEED);
    for group in settings.values_mut().filter_map(Value::as_object_mut) {
        group.remove(SEED);
    }
    Value::Object(settings)
}

/// What is learned under `name`, and the settings it depends on: all except those of `drawing`.
pub(super) fn learned_with(name: &str, settings: &impl Serialize, drawing: &[&str]) -> Value {
    let mut settings = recorded(settings);
    if let Some(settings) = settings.as_object_mut() {
        settings.retain(|name, _| !drawing.contains(&name.as_str()));
    }
    json!({"learned": name, "settings": settings})
}

fn object(settings: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(settings) {
        Ok(Value::Object(settings)) => Ok(settings),
        _ => Err(Error::invalid_input(
            "settings are no list of names and values",
        )),
    }
}

/// The place of the setting `name`, in the settings themselves or in one of their groups.
fn place_of<'a>(settings: &'a mut Map<String, Value>, name: &str) -> Option<&'a mut Value> {
    if settings.get(name).is_some_and(|value| !value.is_object()) {
        return settings.get_mut(name);
    }
    let groups = settings.values_mut().filter_map(Value::as_object_mut);
    groups.filter_map(|group| group.get_mut(name)).next()
}

/// The names of all settings except the seed.
fn names(settings: &Map<String, Value>) -> Vec<String> {
    let mut names = Vec::new();
    for (name, value) in settings {
        match value {
            Value::Object(group) => names.extend(group.keys().cloned()),
            _ => names.push(name.clone()),
        }
    }
    names.retain(|name| name != SEED);
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use difference_inversion::diffusion::draw::TextToImage;
    use difference_inversion::method::generate_config::AnalogyConfig;

    fn given(values: &Value) -> Map<String, Value> {
        values.as_object().unwrap().clone()
    }

    #[test]
    fn settings_are_found_in_their_groups() {
        let values = given(&json!({"alpha": 0.2, "inversion": "ddim", "initialisation": "random"}));
        let config = with_settings(&AnalogyConfig::default(), &values).unwrap();
        assert_eq!(config.learn.alpha, 0.2);
        assert_eq!(config.learn.steps, AnalogyConfig::default().learn.steps);
        assert_eq!(recorded(&config)["generate"]["inversion"], "ddim");
        assert_eq!(recorded(&config)["learn"].get("seed"), None);
        let flat = with_settings(&TextToImage::default(), &given(&json!({"strength": 0.5})));
        assert_eq!(flat.unwrap().strength, 0.5);
    }

    #[test]
    fn settings_of_drawing_do_not_count_for_what_is_learned() {
        let learned = |values: Value| {
            let config = with_settings(&AnalogyConfig::default(), &given(&values)).unwrap();
            learned_with("tokens", &config.with_seed(7), &["generate"])
        };
        let usual = learned(json!({}));
        assert_eq!(usual, learned(json!({"guidance_scale": 4.0})));
        assert_ne!(usual, learned(json!({"lambda_clip": 4.0})));
        assert!(!usual.to_string().contains("seed"), "{usual}");
    }

    #[test]
    fn what_is_no_setting_is_named() {
        let complain = |values: Value| {
            let error = with_settings(&AnalogyConfig::default(), &given(&values)).unwrap_err();
            error.to_string()
        };
        assert!(
            complain(json!({"alhpa": 1})).starts_with("there is no setting `alhpa`; there are")
        );
        assert!(complain(json!({"seed": 1})).contains("no setting `seed`"));
        assert!(complain(json!({"learn": {}})).contains("no setting `learn`"));
        assert!(complain(json!({"alpha": "much"})).starts_with("setting `alpha`: invalid type"));
    }
}
