//! The frozen prompts of pictures: captions, and words found by PEZ.

use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::diffusion::frozen::Models;
use crate::diffusion::words::{Prompt, Words};
use crate::method::pez;
use crate::util::progress::{self, Observer, Stage};
use crate::util::settings::{Checks, Unread};
use crate::{Error, Result};

/// The source of a picture's prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromptMode {
    /// The caption, written by the captioner or given by the user.
    #[default]
    Caption,
    /// Words found by PEZ for the picture, without the caption.
    Optimised,
    /// The caption followed by words found by PEZ.
    #[serde(rename = "caption+optimised")]
    CaptionOptimised,
    /// The user's own text only: nothing is captioned, and a missing text is an error.
    Text,
}

/// How prompts are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptConfig {
    #[doc = about!(prompt_mode)]
    pub prompt_mode: PromptMode,
    #[doc = about!(pez_tokens)]
    ///
    /// Entries of the vocabulary, found by PEZ.
    pub pez_tokens: usize,
    #[doc = about!(pez_steps)]
    pub pez_steps: usize,
    #[doc = about!(pez_learning_rate)]
    ///
    /// That of AdamW in PEZ.
    pub pez_learning_rate: f64,
    #[doc = about!(pez_weight_decay)]
    ///
    /// That of AdamW in PEZ.
    pub pez_weight_decay: f64,
    #[doc = about!(seed)]
    ///
    /// PEZ's starting words are drawn with it.
    pub seed: u64,
}

impl Default for PromptConfig {
    fn default() -> Self {
        Self {
            prompt_mode: PromptMode::Caption,
            pez_tokens: 10,
            pez_steps: 200,
            pez_learning_rate: 0.1,
            pez_weight_decay: 0.1,
            seed: 0,
        }
    }
}

impl PromptConfig {
    /// The settings that have no effect with the other settings.
    pub fn unread(&self) -> Vec<Unread> {
        let read = matches!(
            self.prompt_mode,
            PromptMode::Optimised | PromptMode::CaptionOptimised
        );
        let needs = "the prompt mode `optimised` or `caption+optimised`";
        Unread::among(
            [
                "pez_tokens",
                "pez_steps",
                "pez_learning_rate",
                "pez_weight_decay",
            ]
            .map(|setting| (setting, read, needs)),
        )
    }

    /// Checks that the settings are valid.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first invalid one.
    pub fn validate(&self) -> Result<()> {
        Checks::default()
            .at_least_1("pez_tokens", self.pez_tokens)
            .at_least_1("pez_steps", self.pez_steps)
            .rate("pez_learning_rate", self.pez_learning_rate)
            .weight("pez_weight_decay", self.pez_weight_decay)
            .result()
    }
}

/// A picture with its caption, and its number among those of a run.
pub(crate) struct Picture<'a> {
    pub(crate) image: &'a RgbImage,
    pub(crate) caption: String,
    pub(crate) number: usize,
}

/// A picture's caption, as given or as written by the captioner.
pub(crate) fn caption_unless_given(
    models: &Models,
    image: &RgbImage,
    given: Option<&str>,
    mode: PromptMode,
    observer: Observer<'_>,
) -> Result<String> {
    if let Some(text) = given {
        return Ok(text.to_owned());
    }
    if mode == PromptMode::Text {
        return Err(Error::Missing {
            what: "a prompt".to_owned(),
            reason: "with the prompt mode `text` every picture needs its own text".to_owned(),
        });
    }
    progress::step(&mut *observer, Stage::Caption, 0, 1)?;
    let caption = models.caption(image)?;
    progress::step(observer, Stage::Caption, 1, 1)?;
    Ok(caption)
}

/// The captions of A and A′, as given or as written by the captioner: of both at once, if neither is given.
pub(crate) fn captions_unless_given(
    models: &Models,
    [a, a_prime]: [&RgbImage; 2],
    given: [Option<&str>; 2],
    mode: PromptMode,
    observer: Observer<'_>,
) -> Result<[String; 2]> {
    if given == [None, None] && mode != PromptMode::Text {
        progress::step(&mut *observer, Stage::Caption, 0, 2)?;
        let captions = models.caption_pair(a, a_prime)?;
        progress::step(observer, Stage::Caption, 2, 2)?;
        return Ok(captions);
    }
    let mut caption =
        |image, given| caption_unless_given(models, image, given, mode, &mut *observer);
    Ok([caption(a, given[0])?, caption(a_prime, given[1])?])
}

/// P_X: the frozen prompt of a picture, read by the text encoders. `number` distinguishes the pictures
/// of one run.
pub(crate) fn prompt(
    models: &Models,
    picture: &Picture<'_>,
    config: &PromptConfig,
    num_tokens: usize,
    observer: Observer<'_>,
) -> Result<Words> {
    let caption = models.pipeline().prompt(&picture.caption)?;
    let prefix = match config.prompt_mode {
        PromptMode::Caption | PromptMode::Text => None,
        PromptMode::Optimised => Some(Prompt::default()),
        PromptMode::CaptionOptimised => Some(caption.clone()),
    };
    let prompt = match prefix {
        None => caption,
        Some(prefix) => {
            models.pipeline().check_num_tokens(num_tokens)?;
            let room = pez::room(models.pipeline().text_encoders(), config, num_tokens)?;
            let (prefix, cut) = prefix.shortened(room);
            if cut > 0 {
                let notice = format!(
                    "the caption `{}` is too long for the text encoder together with the optimised \
                         words and the difference tokens: its last {cut} token ids are cut off",
                    prefix.text()
                );
                progress::notice(&mut *observer, notice);
            }
            let joint = &models.joints()?[0];
            let image = joint.image_features(picture.image)?;
            let found = pez::optimise(
                joint,
                &image,
                &prefix,
                config,
                picture.number,
                &mut *observer,
            )?;
            models.pipeline().spelled(found, joint.encoder())?
        }
    };
    let words = models.pipeline().read(&prompt, num_tokens)?;
    if let Some(notice) = words.notice() {
        progress::notice(observer, notice);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_that_makes_no_sense_is_named() {
        PromptConfig::default().validate().unwrap();
        let message = |change: fn(&mut PromptConfig)| {
            let mut config = PromptConfig::default();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert_eq!(
            message(|config| config.pez_steps = 0),
            "setting `pez_steps`: expected at least 1, found 0"
        );
        assert!(message(|config| config.pez_tokens = 0).contains("`pez_tokens`"));
        for rate in [0.0, -0.1, f64::NAN, f64::INFINITY] {
            let config = PromptConfig {
                pez_learning_rate: rate,
                ..PromptConfig::default()
            };
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains("`pez_learning_rate`"), "{error}");
        }
        assert!(
            message(|config| config.pez_weight_decay = f64::NAN).contains("`pez_weight_decay`")
        );
        assert!(message(|config| config.pez_weight_decay = -1.0).contains("`pez_weight_decay`"));
    }
}
