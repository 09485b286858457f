//! The words that describe a picture: captions, optimised prompts, and the Full Prompt.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::models::clip_text::PrefixCache;
use crate::models::tokenizer::ClipTokenizer;
use crate::settings::{Checks, Unread};
use crate::tokens::signed;

/// Where a picture's prompt comes from.
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
    /// The user's own text only: nothing is captioned, a missing text is an error.
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
    /// The settings that are not read, as the others are.
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

    /// Checks that the settings make sense.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) naming the first that does not.
    pub fn validate(&self) -> Result<()> {
        Checks::default()
            .at_least_1("pez_tokens", self.pez_tokens)
            .at_least_1("pez_steps", self.pez_steps)
            .positive("pez_learning_rate", self.pez_learning_rate)
            .not_negative("pez_weight_decay", self.pez_weight_decay)
            .result()
    }
}

/// The words of a prompt, without start, end and padding.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    text: String,
    /// The unit that dropping works on.
    words: Vec<Word>,
}

/// The ids of a word: by each text encoder's tokenizer, or by one for all of them. Tokenizers of one
/// vocabulary still differ in what they read as special, such as SDXL's second in `!`.
type Word = Vec<Vec<u32>>;

impl Prompt {
    /// The words of a text, separated by white space, as each text encoder's tokenizer cuts them.
    ///
    /// # Errors
    /// [`Error::InvalidFile`](crate::Error::InvalidFile) if the vocabulary cannot express the text.
    pub fn new(text: &str, tokenizers: &[&ClipTokenizer]) -> Result<Self> {
        let words = text
            .split_whitespace()
            .map(|word| (tokenizers.iter()).map(|one| one.encode(word)).collect())
            .collect::<Result<_>>()?;
        Ok(Self {
            text: text.trim().to_owned(),
            words,
        })
    }

    /// Entries of the vocabulary, each a word of its own, the same for all text encoders.
    ///
    /// # Errors
    /// [`Error::InvalidFile`](crate::Error::InvalidFile) if an id is not in the vocabulary.
    pub fn from_ids(ids: &[u32], tokenizer: &ClipTokenizer) -> Result<Self> {
        Ok(Self {
            text: tokenizer.decode(ids)?,
            words: ids.iter().map(|&id| vec![vec![id]]).collect(),
        })
    }

    /// These words, then those of `other`.
    #[must_use]
    pub fn followed_by(mut self, other: &Self) -> Self {
        self.text = format!("{} {}", self.text, other.text).trim().to_owned();
        self.words.extend(other.words.iter().cloned());
        self
    }

    /// Only the words for which `keep`, asked once for each word in order, says so.
    #[must_use]
    pub(crate) fn filtered(&self, mut keep: impl FnMut() -> bool) -> Self {
        let words = self.words.iter().filter(|_| keep()).cloned().collect();
        let text = self.text.clone();
        Self { text, words }
    }

    /// As much of its beginning as takes at most `room` places in every text encoder, and how many
    /// token ids are cut off; the text stays.
    #[must_use]
    pub(crate) fn shortened(self, room: usize) -> (Self, usize) {
        let encoders = self.words.iter().map(Vec::len).max().unwrap_or(0);
        let longest = (0..encoders).map(|encoder| self.ids(encoder).len()).max();
        let cut = longest.unwrap_or(0).saturating_sub(room);
        if cut == 0 {
            return (self, 0);
        }
        let mut left = vec![room; encoders];
        let words = self.words.iter().map(|word| {
            let beginnings = left.iter_mut().enumerate().map(|(encoder, left)| {
                let mut ids = ids(word, encoder).to_vec();
                ids.truncate(*left);
                *left -= ids.len();
                ids
            });
            beginnings.collect::<Word>()
        });
        let words = words.filter(|word| word.iter().any(|ids| !ids.is_empty()));
        let words = words.collect();
        (Self { words, ..self }, cut)
    }

    /// The text as it was given or found.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The ids of all words for text encoder `encoder`, counted from 0.
    pub fn ids(&self, encoder: usize) -> Vec<u32> {
        let ids = self.words.iter().flat_map(|word| ids(word, encoder));
        ids.copied().collect()
    }
}

/// The ids of a word for text encoder `encoder`.
fn ids(word: &Word, encoder: usize) -> &[u32] {
    word.get(encoder)
        .or(word.first())
        .map_or(&[], Vec::as_slice)
}

/// The words of a prompt as the text encoders read them. The encoders are causal: whatever follows
/// the words, this is computed once.
#[derive(Debug, Clone, Default)]
pub struct Words {
    pub(crate) prompt: Prompt,
    /// Start and words in each text encoder.
    pub(crate) beginnings: Vec<PrefixCache>,
    /// Token ids that did not fit beside the difference tokens.
    pub(crate) cut: usize,
}

impl Words {
    /// The prompt.
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// What to tell a person if words had to be cut off.
    pub fn notice(&self) -> Option<String> {
        (self.cut > 0).then(|| {
            format!(
                "the prompt `{}` is too long for the text encoder beside the difference tokens: \
                 its last {} token ids are cut off",
                self.prompt.text, self.cut
            )
        })
    }
}

/// The Full Prompt: words, then difference tokens if there are any.
#[derive(Debug, Clone)]
pub struct FullPrompt<'a> {
    /// The words.
    pub words: &'a Words,
    /// Token embeddings after the words, one [n, d] per text encoder; empty for words alone.
    pub difference: Vec<Tensor<2>>,
    /// How much of what these change in the text encoders' outputs is let in: nothing with 0, all of
    /// it with 1.
    pub strength: f64,
}

impl<'a> FullPrompt<'a> {
    /// Words alone.
    pub fn plain(words: &'a Words) -> Self {
        Self {
            words,
            difference: Vec::new(),
            strength: 1.0,
        }
    }

    /// [P, ±D̃]: the words, then the difference tokens, negated for a negative `strength`; with any
    /// other strength than ±1, a part of what they change, or more than that:
    /// `c(P) + |strength| · (c([P, ±D̃]) − c(P))`.
    ///
    /// The tokens themselves are not scaled: the text encoder normalises what it reads, so that half
    /// of them says as much (`docs/study.md`), and tokens of zeros still say something.
    ///
    /// # Shapes
    /// `difference`: one [n, d] per text encoder, tracked by autodiff or not.
    pub fn with_difference(words: &'a Words, difference: &[Tensor<2>], strength: f64) -> Self {
        let sign = if strength < 0.0 { -1.0 } else { 1.0 };
        Self {
            words,
            difference: difference.iter().map(|d| signed(d, sign)).collect(),
            strength: strength.abs(),
        }
    }
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

    #[test]
    fn a_prompt_is_shortened_to_the_room_of_the_encoder_that_needs_most() {
        let prompt = Prompt {
            text: "one two three".to_owned(),
            words: vec![
                vec![vec![1], vec![11]],
                vec![vec![2], vec![12, 22]],
                vec![vec![3, 4]],
            ],
        };
        assert_eq!(prompt.clone().shortened(5), (prompt.clone(), 0));
        let (short, cut) = prompt.clone().shortened(3);
        assert_eq!(cut, 2);
        assert_eq!(short.ids(0), [1, 2, 3]);
        assert_eq!(short.ids(1), [11, 12, 22]);
        assert_eq!(short.text(), "one two three");
        assert!(prompt.shortened(0).0.ids(1).is_empty());
    }
}
