//! Words of textual inversions, `<name>`, in prompts and captions.

use std::collections::BTreeSet;

use burn::tensor::Device;
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::method::difference::DifferenceTokens;

use super::flags::ModelSettings;
use super::terminal::Failure;

/// A note about text that is written like a learned word but is not one.
pub(crate) fn unknown<'a>(
    pipeline: &Pipeline,
    texts: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let words = texts
        .into_iter()
        .flat_map(|text| pipeline.unknown_words(text));
    let words: BTreeSet<String> = words.map(|word| format!("`{word}`")).collect();
    let names: Vec<String> = words.into_iter().collect();
    (!names.is_empty()).then(|| {
        format!(
            "{} is read as plain text: there is no `--embedding` of this name",
            names.join(", ")
        )
    })
}

/// Notes about embeddings whose words do not occur in `texts`. A difference is refused, since it is likely meant to
/// follow the prompt.
pub(crate) fn unused(models: &ModelSettings, texts: [&str; 2]) -> anyhow::Result<Vec<String>> {
    let mut notices = Vec::new();
    for file in models.embeddings() {
        if texts.iter().any(|text| file.is_in(text)) {
            continue;
        }
        let (path, name) = (file.path.display(), file.name());
        if DifferenceTokens::load(&file.path, &Device::flex()).is_ok() {
            let message = format!("{path} is a difference, and the prompt has no `<{name}>`");
            let hint = format!("`--difference {path}` appends it to the prompt");
            return Err(Failure::usage(message).hint(hint).into());
        }
        notices.push(format!(
            "{path} changes nothing: write `<{name}>` in the prompt where it belongs"
        ));
    }
    Ok(notices)
}
