//! The input of text encoders: the words of a prompt, and the Full Prompt with difference tokens after them.

use burn::tensor::Tensor;

use crate::Result;
use crate::diffusion::text_encoder::{Beginning, Encoded};
use crate::models::text::tokenizer::Tokenizer;

/// The words of a prompt, without start, end and padding.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    text: String,
    /// The unit that dropping works on.
    words: Vec<Word>,
}

/// The ids of a word: by each text encoder's tokenizer, or by one for all of them. Tokenizers with the same
/// vocabulary still differ in special tokens, such as `!` in SDXL's second.
type Word = Vec<Vec<u32>>;

impl Prompt {
    /// The words of a text, separated by white space, as each text encoder's tokenizer splits them. White space around
    /// the text is left out, also for Qwen3, whose template diffusers fills with it.
    ///
    /// # Errors
    /// [`Error::InvalidFile`](crate::Error::InvalidFile) if the vocabulary cannot express the text.
    pub fn new(text: &str, tokenizers: &[&Tokenizer]) -> Result<Self> {
        let text = text.trim();
        let mut words: Vec<(usize, Word)> = text
            .split_whitespace()
            .map(|word| {
                let start = word.as_ptr().addr() - text.as_ptr().addr();
                (start, vec![Vec::new(); tokenizers.len()])
            })
            .collect();
        for (number, tokenizer) in tokenizers.iter().enumerate() {
            for (id, end) in tokenizer.encode_with_ends(text)? {
                // A token may contain white space: it belongs to the word in which it ends.
                let place = words.partition_point(|(start, _)| *start < end);
                if let Some((_, word)) = words.get_mut(place.saturating_sub(1)) {
                    word[number].push(id);
                }
            }
        }
        let words = words.into_iter().map(|(_, word)| word);
        Ok(Self {
            text: text.to_owned(),
            words: words
                .filter(|word| !word.iter().all(Vec::is_empty))
                .collect(),
        })
    }

    /// Entries of the vocabulary, each a word of its own, the same for all text encoders.
    ///
    /// # Errors
    /// [`Error::InvalidFile`](crate::Error::InvalidFile) if an id is not in the vocabulary.
    pub fn from_ids(ids: &[u32], tokenizer: &Tokenizer) -> Result<Self> {
        Ok(Self {
            text: tokenizer.decode(ids)?,
            words: ids.iter().map(|&id| vec![vec![id]]).collect(),
        })
    }

    /// The same, with ids meant for all text encoders respelled for those with another vocabulary: `others` has
    /// a tokenizer for each of these, and `None` for the rest.
    ///
    /// # Errors
    /// [`Error::InvalidFile`](crate::Error::InvalidFile) if a vocabulary cannot express a word.
    pub(crate) fn spelled(
        mut self,
        own: &Tokenizer,
        others: &[Option<&Tokenizer>],
    ) -> Result<Self> {
        if others.iter().all(Option::is_none) {
            return Ok(self);
        }
        for word in self.words.iter_mut().filter(|word| word.len() == 1) {
            let text = own.decode(&word[0])?;
            let spelled = others.iter().map(|other| match other {
                Some(other) => other.encode(&text),
                None => Ok(word[0].clone()),
            });
            *word = spelled.collect::<Result<_>>()?;
        }
        Ok(self)
    }

    /// These words, then those of `other`.
    #[must_use]
    pub fn followed_by(mut self, other: &Self) -> Self {
        self.text = format!("{} {}", self.text, other.text).trim().to_owned();
        self.words.extend(other.words.iter().cloned());
        self
    }

    /// Only the words that `keep`, called once per word in order, accepts.
    #[must_use]
    pub(crate) fn filtered(&self, mut keep: impl FnMut() -> bool) -> Self {
        let words = self.words.iter().filter(|_| keep()).cloned().collect();
        let text = self.text.clone();
        Self { text, words }
    }

    /// The longest beginning that takes at most `room` places in every text encoder, and the number of token ids
    /// cut off; the text stays.
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

    /// Whether it has the same words, whatever is between them.
    pub(crate) fn has_words_of(&self, other: &Self) -> bool {
        self.words == other.words
    }

    /// The text as given or found.
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

/// The words of a prompt as read by the text encoders: what can be computed once, whatever follows the words. Of a
/// causal encoder these are keys and values, of T5 only the embeddings.
#[derive(Debug, Clone, Default)]
pub struct Words {
    pub(crate) prompt: Prompt,
    /// Start and words in each text encoder that difference tokens are learned for.
    pub beginnings: Vec<Beginning>,
    /// The whole prompt in each of the other encoders.
    pub(crate) whole: Vec<Encoded>,
    /// Token ids that did not fit together with the difference tokens.
    pub(crate) cut: usize,
}

impl Words {
    /// The prompt.
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// A note if words had to be cut off.
    pub fn notice(&self) -> Option<String> {
        (self.cut > 0).then(|| {
            format!(
                "the prompt `{}` is too long for the text encoder together with the difference tokens: \
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
    /// Token embeddings after the words, one [n, d] per text encoder that they are learned for; empty
    /// for words alone.
    pub difference: Vec<Tensor<2>>,
    /// The share of the tokens' effect on the text encoders' outputs that is applied: 0 is none, and 1 is
    /// all of it.
    pub strength: f64,
}

impl<'a> FullPrompt<'a> {
    /// Only words.
    pub fn plain(words: &'a Words) -> Self {
        Self {
            words,
            difference: Vec::new(),
            strength: 1.0,
        }
    }

    /// [P, ±D̃]: the words, then the difference tokens, negated for a negative `strength`. A strength other than ±1
    /// scales their effect: `c(P) + |strength| · (c([P, ±D̃]) − c(P))`.
    ///
    /// The tokens themselves are not scaled: the text encoder normalises its input, so half of them has the same
    /// effect (`docs/study.md`), and tokens of zeros still have one.
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

/// ±D̃. Only here is the sign of the tokens given its meaning: it applies to the embeddings at the text
/// encoder's *input*. (A strength applies to its output, see
/// [`FullPrompt`](crate::diffusion::words::FullPrompt).)
pub(crate) fn signed(embedding: &Tensor<2>, sign: f64) -> Tensor<2> {
    embedding.clone().mul_scalar(sign)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::models::text::tokenizer::ClipTokenizer;

    #[test]
    fn words_have_the_ids_of_the_whole_text() {
        #[derive(serde::Deserialize)]
        struct Expected {
            texts: Vec<String>,
            layouts: BTreeMap<String, Layout>,
        }
        #[derive(serde::Deserialize)]
        struct Layout {
            ids: Vec<Vec<u32>>,
        }
        let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let golden = golden.join("tests/golden/tokenizer");
        let expected: Expected =
            crate::weights::read_config(&golden.join("expected.json")).unwrap();
        for (name, layout) in expected.layouts {
            let own = ClipTokenizer::open(&golden.join(&name)).unwrap();
            for (text, ids) in expected.texts.iter().zip(layout.ids) {
                let prompt = Prompt::new(text, &[own.tokenizer()]).unwrap();
                assert_eq!(prompt.ids(0), ids, "{name}: {text:?}");
            }
        }
        // A token of two words, and one tokenizer that knows it.
        let open = |name: &str| ClipTokenizer::open(&golden.join(name)).unwrap();
        let (knows, plain) = (open("added_tokens"), open("files"));
        let tokenizers = [knows.tokenizer(), plain.tokenizer()];
        let prompt = Prompt::new("a  two words b", &tokenizers).unwrap();
        assert_eq!(prompt.ids(0), [320, 665, 321]);
        assert_eq!(prompt.words.len(), 4);
        assert_eq!(prompt.words[1][0], [0u32; 0]);
        assert_eq!(prompt.words[2][0], [665]);
    }

    #[test]
    fn ids_are_spelled_anew_for_another_vocabulary() {
        let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/golden");
        let open = |folder: &Path| ClipTokenizer::open(folder).unwrap().into_tokenizer();
        let own = open(&golden.join("tokenizer/files"));
        // One that knows only letters.
        let letters = tempfile::tempdir().unwrap();
        let pieces = ('a'..='z').flat_map(|letter| [letter.to_string(), format!("{letter}</w>")]);
        let specials = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
        let vocabulary: BTreeMap<String, usize> = pieces.chain(specials).zip(0..).collect();
        let vocabulary = serde_json::to_string(&vocabulary).unwrap();
        std::fs::write(letters.path().join("vocab.json"), vocabulary).unwrap();
        std::fs::write(letters.path().join("merges.txt"), "").unwrap();
        let other = open(letters.path());

        let ids = own.encode("house").unwrap();
        let prompt = Prompt::from_ids(&ids, &own).unwrap();
        let spelled = prompt.clone().spelled(&own, &[None, Some(&other)]).unwrap();
        assert_eq!(spelled.ids(0), ids);
        let place = |letter: char| 2 * (u32::from(letter) - u32::from('a'));
        let expected = [
            place('h'),
            place('o'),
            place('u'),
            place('s'),
            place('e') + 1,
        ];
        assert_eq!(spelled.ids(1), expected);
        assert_eq!(prompt.clone().spelled(&own, &[None, None]).unwrap(), prompt);
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
