//! Text to ids and back; and CLIP's tokenizer: lower-cased text to byte-pair ids, as transformers'
//! `CLIPTokenizer`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::{Lowercase, NFC, Sequence as Normalizers};
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer as Rules};

use crate::weights::read_config;
use crate::{Error, Result};

/// Where a text encoder's vocabulary is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    /// The folder of `tokenizer.json`, or of `vocab.json` and `merges.txt`.
    pub folder: PathBuf,
    /// The token that prompts are filled up with, if not the one that the folder names.
    pub pad_token: Option<&'static str>,
}

/// How CLIP cuts a text into words: contractions, runs of letters, single digits, runs of the rest.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// What the last piece of a word ends with in the vocabulary.
const END_OF_WORD: &str = "</w>";
/// The length of CLIP's context, if a folder does not state its own.
const DEFAULT_LENGTH: usize = 77;

/// A special token as configuration files write it.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Added { content: String },
}

impl SpecialToken {
    fn content(self) -> String {
        match self {
            Self::Text(content) | Self::Added { content } => content,
        }
    }
}

/// The fields of `tokenizer_config.json` and `special_tokens_map.json` that matter here.
#[derive(Debug, Default, Deserialize)]
struct Specials {
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
    /// Written as 1e30 by tokenizers without a limit.
    model_max_length: Option<f64>,
}

/// Text to ids and back, of whatever text encoder.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    rules: Rules,
    /// The folder, for errors.
    dir: PathBuf,
}

impl Tokenizer {
    /// Opens the `tokenizer.json` of a folder.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] when it is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self {
            rules: open_tokenizer_json(&dir.join("tokenizer.json"))?,
            dir: dir.to_owned(),
        })
    }

    /// The id of a token, such as a special one.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] when the vocabulary does not have it.
    pub fn id(&self, token: &str) -> Result<u32> {
        self.rules.token_to_id(token).ok_or_else(|| {
            let reason = format!("the special token {token:?} is not in the vocabulary");
            Error::invalid_file(&self.dir, reason)
        })
    }

    /// The ids of `text`, without a start or an end, of whatever length.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] when the vocabulary cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .rules
            .encode_fast(text, false)
            .map_err(|error| Error::invalid_file(&self.dir, error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, with spaces between words and without special tokens.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] when the vocabulary cannot express the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let text = self
            .rules
            .decode(ids, true)
            .map_err(|error| Error::invalid_file(&self.dir, error.to_string()))?;
        Ok(text.replace(END_OF_WORD, " ").trim().to_owned())
    }

    /// The number of tokens, special ones included; ids are below it.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.rules.get_vocab_size(true)
    }

    /// The piece of the vocabulary behind `id`, such as CLIP's with `</w>` if it ends a word.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.rules.id_to_token(id)
    }
}

/// The tokenizer of a CLIP text encoder, and the special ids of its prompts.
#[derive(Clone, Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    bos: u32,
    eos: u32,
    pad: u32,
    model_max_length: usize,
}

impl ClipTokenizer {
    /// Opens the folder `dir`: `tokenizer.json` if there is one, else `vocab.json` and
    /// `merges.txt`; special tokens and length from `tokenizer_config.json` and
    /// `special_tokens_map.json` (the latter wins, as in transformers).
    ///
    /// # Errors
    /// When a file is missing or damaged, or a special token is not in the vocabulary.
    pub fn open(dir: &Path) -> Result<Self> {
        let read = |name: &str| match dir.join(name) {
            path if path.exists() => read_config::<Specials>(&path),
            _ => Ok(Specials::default()),
        };
        let (config, map) = (
            read("tokenizer_config.json")?,
            read("special_tokens_map.json")?,
        );
        let special =
            |from_map: Option<SpecialToken>, from_config: Option<SpecialToken>, default: &str| {
                from_map
                    .or(from_config)
                    .map_or_else(|| default.to_owned(), SpecialToken::content)
            };
        let bos = special(map.bos_token, config.bos_token, "<|startoftext|>");
        let eos = special(map.eos_token, config.eos_token, "<|endoftext|>");
        let unk = special(map.unk_token, config.unk_token, &eos);
        let pad = special(map.pad_token, config.pad_token, &eos);

        let path = dir.join("tokenizer.json");
        let mut tokenizer = Tokenizer {
            rules: match path.exists() {
                true => open_tokenizer_json(&path)?,
                false => from_vocabulary(dir, &unk)?,
            },
            dir: dir.to_owned(),
        };
        tokenizer.id(&unk)?;
        let [bos_id, eos_id, pad_id] = [&bos, &eos, &pad].map(|token| tokenizer.id(token));
        let (bos_id, eos_id, pad_id) = (bos_id?, eos_id?, pad_id?);
        let specials = [&bos, &eos, &unk, &pad].map(|token| AddedToken::from(token.as_str(), true));
        tokenizer.rules.add_special_tokens(&specials);
        Ok(Self {
            tokenizer,
            bos: bos_id,
            eos: eos_id,
            pad: pad_id,
            model_max_length: config
                .model_max_length
                .map_or(DEFAULT_LENGTH, bounded_length),
        })
    }

    /// Opens a vocabulary, whose prompts may be filled up with another token than its own.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of(vocabulary: &Vocabulary) -> Result<Self> {
        let mut tokenizer = Self::open(&vocabulary.folder)?;
        if let Some(token) = vocabulary.pad_token {
            let id = tokenizer.tokenizer.rules.token_to_id(token);
            tokenizer.pad = id.ok_or_else(|| {
                let reason = format!("the padding token {token:?} is not in the vocabulary");
                Error::invalid_file(&vocabulary.folder, reason)
            })?;
        }
        Ok(tokenizer)
    }

    /// What turns text into ids.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The same without the special ids.
    #[must_use]
    pub fn into_tokenizer(self) -> Tokenizer {
        self.tokenizer
    }

    /// The text encoder's input: start, `tokens`, end, then padding up to
    /// [`model_max_length`](Self::model_max_length); what does not fit of `tokens` is cut off.
    #[must_use]
    pub fn frame(&self, tokens: &[u32]) -> Vec<u32> {
        let kept = tokens.len().min(self.model_max_length.saturating_sub(2));
        let mut ids = Vec::with_capacity(self.model_max_length);
        ids.push(self.bos);
        ids.extend(&tokens[..kept]);
        ids.push(self.eos);
        ids.resize(self.model_max_length.max(ids.len()), self.pad);
        ids
    }

    /// The id that starts every prompt.
    #[must_use]
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The id that ends every prompt; the text's embedding is read at its place.
    #[must_use]
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The id that fills up a prompt: the end token for CLIP ViT-L, `"!"` (0) for OpenCLIP.
    #[must_use]
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// The number of ids in a prompt, start and end included.
    #[must_use]
    pub fn model_max_length(&self) -> usize {
        self.model_max_length
    }
}

/// A length that a person would write, or [`DEFAULT_LENGTH`] for "no limit".
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the value is between 2 and a million"
)]
fn bounded_length(length: f64) -> usize {
    if (2.0..1e6).contains(&length) {
        length as usize
    } else {
        DEFAULT_LENGTH
    }
}

/// Opens a `tokenizer.json`, without the truncation and padding that it may ask for.
///
/// # Errors
/// [`Error::InvalidFile`] when it is missing or damaged.
pub(crate) fn open_tokenizer_json(path: &Path) -> Result<Rules> {
    let invalid = |error: tokenizers::Error| Error::invalid_file(path, error.to_string());
    let mut tokenizer = Rules::from_file(path).map_err(invalid)?;
    tokenizer.with_truncation(None).map_err(invalid)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// CLIP's tokenizer around the `vocab.json` and `merges.txt` of `dir`.
fn from_vocabulary(dir: &Path, unk: &str) -> Result<Rules> {
    let vocab_path = dir.join("vocab.json");
    let vocab: BTreeMap<String, u32> = read_config(&vocab_path)?;
    let merges_path = dir.join("merges.txt");
    let text = std::fs::read_to_string(&merges_path).map_err(Error::io(&merges_path))?;
    let merges = text
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.trim().is_empty())
        .map(|line| match line.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(Error::invalid_file(
                &merges_path,
                format!("not a pair of tokens: {line:?}"),
            )),
        })
        .collect::<Result<Vec<_>>>()?;
    let invalid = |error: tokenizers::Error| Error::invalid_file(dir, error.to_string());
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix(END_OF_WORD.to_owned())
        .unk_token(unk.to_owned())
        .build()
        .map_err(invalid)?;
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ").map_err(invalid)?;
    let words = SplitPattern::Regex(WORDS.to_owned());
    let split = Split::new(words, SplitDelimiterBehavior::Removed, true).map_err(invalid)?;
    let bytes = ByteLevel::new(false, true, true);

    let mut tokenizer = Rules::new(bpe);
    tokenizer
        .with_normalizer(Some(Normalizers::new(vec![
            NFC.into(),
            spaces.into(),
            Lowercase.into(),
        ])))
        .with_pre_tokenizer(Some(PreTokenizers::new(vec![split.into(), bytes.into()])))
        .with_decoder(Some(bytes));
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(layout: &str) -> PathBuf {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
            .join("tests/golden/tokenizer")
            .join(layout)
    }

    #[derive(Deserialize)]
    struct Expected {
        texts: Vec<String>,
        layouts: BTreeMap<String, Layout>,
    }

    #[derive(Deserialize)]
    struct Layout {
        bos: u32,
        eos: u32,
        pad: u32,
        vocab_size: usize,
        ids: Vec<Vec<u32>>,
        decoded: Vec<String>,
    }

    #[test]
    fn ids_and_texts_equal_transformers() {
        let expected: Expected = read_config(&golden("expected.json")).unwrap();
        for (name, layout) in expected.layouts {
            let tokenizer = ClipTokenizer::open(&golden(&name)).unwrap();
            assert_eq!(
                (tokenizer.bos(), tokenizer.eos()),
                (layout.bos, layout.eos),
                "{name}"
            );
            assert_eq!(tokenizer.pad(), layout.pad, "{name}");
            assert_eq!(
                tokenizer.tokenizer().vocab_size(),
                layout.vocab_size,
                "{name}"
            );
            assert_eq!(tokenizer.model_max_length(), 77, "{name}");
            for ((text, ids), decoded) in expected.texts.iter().zip(layout.ids).zip(layout.decoded)
            {
                assert_eq!(
                    tokenizer.tokenizer().encode(text).unwrap(),
                    ids,
                    "{name}: {text:?}"
                );
                let framed = tokenizer.frame(&ids);
                assert_eq!(
                    tokenizer.tokenizer().decode(&framed).unwrap(),
                    decoded,
                    "{name}: {text:?}"
                );
            }
        }
    }

    #[test]
    fn prompts_are_framed_padded_and_cut() {
        let tokenizer = ClipTokenizer::open(&golden("bang")).unwrap();
        let short = tokenizer.frame(&[7, 8]);
        assert_eq!(short[..5], [tokenizer.bos(), 7, 8, tokenizer.eos(), 0]);
        assert_eq!((short.len(), short[76]), (77, 0));
        let long = tokenizer.frame(&[5; 200]);
        assert_eq!((long.len(), long[75], long[76]), (77, 5, tokenizer.eos()));
    }

    #[test]
    fn missing_and_damaged_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let message = |folder: &Path| ClipTokenizer::open(folder).unwrap_err().to_string();
        assert!(message(folder.path()).contains("vocab.json"));
        std::fs::write(folder.path().join("vocab.json"), r#"{"a": 0, "b": 1}"#).unwrap();
        assert!(message(folder.path()).contains("merges.txt"));
        std::fs::write(folder.path().join("merges.txt"), "#version: 0.2\nab\n").unwrap();
        assert!(message(folder.path()).contains("not a pair"));
        std::fs::write(folder.path().join("merges.txt"), "#version: 0.2\n").unwrap();
        assert!(message(folder.path()).contains("<|endoftext|>"));
        std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
        assert!(message(folder.path()).contains("tokenizer.json"));
    }
}
