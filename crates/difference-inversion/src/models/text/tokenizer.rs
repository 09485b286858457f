//! Text to ids and back; and CLIP's tokenizer: lower-cased text to byte-pair ids, as transformers'
//! `CLIPTokenizer`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::{Lowercase, NFC, Sequence as Normalizers};
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer as Rules};

use crate::models::text::sentencepiece;
use crate::weights::{from_value, read_config};
use crate::{Error, Result};

/// The location of a text encoder's vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    /// The folder of `tokenizer.json`, of `vocab.json` and `merges.txt`, or of T5's `spiece.model`.
    pub folder: PathBuf,
    /// The token that pads prompts, if it differs from the folder's.
    pub pad_token: Option<&'static str>,
}

/// How CLIP splits a text into words: contractions, runs of letters, single digits, runs of the rest.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// How Qwen2 and Qwen3 split a text into words: like CLIP, but a word begins with the space or sign before
/// it, and line breaks and spaces are kept.
const QWEN_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen's padding token, unless a folder states another.
const QWEN_PAD: &str = "<|endoftext|>";
/// Suffix of the last piece of a word in the vocabulary.
const END_OF_WORD: &str = "</w>";
/// The length of CLIP's context, if a folder does not state its own.
const DEFAULT_LENGTH: usize = 77;

/// A token in configuration files: its text, or an object with its properties.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Written {
    Text(String),
    Token(WrittenToken),
}

/// A token, and where in a text it counts as one.
#[derive(Clone, Debug, Deserialize)]
struct WrittenToken {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl From<WrittenToken> for AddedToken {
    fn from(token: WrittenToken) -> Self {
        Self::from(token.content, token.special)
            .single_word(token.single_word)
            .lstrip(token.lstrip)
            .rstrip(token.rstrip)
            .normalized(token.normalized.unwrap_or(!token.special))
    }
}

impl Written {
    fn content(&self) -> &str {
        match self {
            Self::Text(content) => content,
            Self::Token(token) => &token.content,
        }
    }

    /// The same as a special token.
    fn special(self) -> AddedToken {
        match self {
            Self::Text(content) => AddedToken::from(content, true),
            Self::Token(token) => WrittenToken {
                special: true,
                ..token
            }
            .into(),
        }
    }
}

/// Further special tokens, in a list or by names.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Further {
    List(Vec<Written>),
    Named(BTreeMap<String, Written>),
}

impl Further {
    fn tokens(&self) -> Box<dyn Iterator<Item = &Written> + '_> {
        match self {
            Self::List(tokens) => Box::new(tokens.iter()),
            Self::Named(tokens) => Box::new(tokens.values()),
        }
    }
}

/// The relevant fields of `tokenizer_config.json` and `special_tokens_map.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Specials {
    bos_token: Option<Written>,
    eos_token: Option<Written>,
    pad_token: Option<Written>,
    unk_token: Option<Written>,
    sep_token: Option<Written>,
    cls_token: Option<Written>,
    mask_token: Option<Written>,
    additional_special_tokens: Option<Further>,
    extra_special_tokens: Option<Further>,
    /// Written as 1e30 by tokenizers without a limit.
    model_max_length: Option<f64>,
    padding_side: Option<String>,
    truncation_side: Option<String>,
    split_special_tokens: Option<bool>,
    /// All tokens besides those of the byte pair encoding, since transformers 4.34.
    added_tokens_decoder: Option<BTreeMap<u32, WrittenToken>>,
}

impl Specials {
    /// Refuses prompts that are padded or cut at their beginning, and invalid special tokens.
    fn check(&self, path: &Path) -> Result<()> {
        let sides = [
            ("padding_side", &self.padding_side),
            ("truncation_side", &self.truncation_side),
        ];
        for (field, side) in sides {
            if let Some(side) = side.as_deref().filter(|side| *side != "right") {
                return Err(Error::unsupported(path, field, "right", side));
            }
        }
        match self.split_special_tokens {
            Some(true) => Err(Error::unsupported(
                path,
                "split_special_tokens",
                "false",
                true,
            )),
            _ => Ok(()),
        }
    }

    /// These tokens, overridden by those of `map`.
    fn overridden_by(self, map: Self) -> Self {
        Self {
            bos_token: map.bos_token.or(self.bos_token),
            eos_token: map.eos_token.or(self.eos_token),
            pad_token: map.pad_token.or(self.pad_token),
            unk_token: map.unk_token.or(self.unk_token),
            sep_token: map.sep_token.or(self.sep_token),
            cls_token: map.cls_token.or(self.cls_token),
            mask_token: map.mask_token.or(self.mask_token),
            additional_special_tokens: (map.additional_special_tokens)
                .or(self.additional_special_tokens),
            extra_special_tokens: map.extra_special_tokens.or(self.extra_special_tokens),
            ..self
        }
    }

    /// The tokens that have a name.
    fn named(&self) -> impl Iterator<Item = &Written> {
        let named = [
            &self.bos_token,
            &self.eos_token,
            &self.unk_token,
            &self.sep_token,
            &self.pad_token,
            &self.cls_token,
            &self.mask_token,
        ];
        named.into_iter().flatten()
    }

    /// All tokens.
    fn tokens(&self) -> impl Iterator<Item = &Written> {
        let further = [&self.additional_special_tokens, &self.extra_special_tokens];
        self.named()
            .chain(further.into_iter().flatten().flat_map(Further::tokens))
    }
}

/// Text to ids and back, for any text encoder.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    rules: Rules,
    /// The folder, for errors.
    dir: PathBuf,
    /// The number of consecutive ids that a learned word stands for, by its first id.
    words: BTreeMap<u32, u32>,
}

impl Tokenizer {
    /// Opens the `tokenizer.json` of a folder.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::InvalidFile`] when it is damaged.
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self {
            rules: open_tokenizer_json(&dir.join("tokenizer.json"))?,
            dir: dir.to_owned(),
            words: BTreeMap::new(),
        })
    }

    /// Opens T5's tokenizer in a folder: `tokenizer.json` if present, else `spiece.model`.
    ///
    /// # Errors
    /// [`Error::Io`] when neither can be read, [`Error::InvalidFile`] when it is damaged.
    pub fn open_t5(dir: &Path) -> Result<Self> {
        let path = dir.join("spiece.model");
        if dir.join("tokenizer.json").exists() || !path.exists() {
            return Self::open(dir);
        }
        Ok(Self {
            rules: sentencepiece::open(&path)?,
            dir: dir.to_owned(),
            words: BTreeMap::new(),
        })
    }

    /// Opens the byte-level tokenizer of Qwen2 and Qwen3 in a folder: `tokenizer.json` if present, else
    /// `vocab.json` and `merges.txt` with the tokens that `tokenizer_config.json` or `added_tokens.json` adds.
    /// Also returns the id of padding.
    ///
    /// # Errors
    /// When a file is missing or damaged, the padding is not in the vocabulary, or the id of an added token is
    /// not the next one.
    pub fn open_qwen(dir: &Path) -> Result<(Self, u32)> {
        let path = dir.join("tokenizer_config.json");
        let mut specials: Specials = match path.exists() {
            true => read_config(&path)?,
            false => Specials::default(),
        };
        specials.check(&path)?;
        let tokenizer = if dir.join("tokenizer.json").exists() {
            Self::open(dir)?
        } else {
            let known: Vec<Written> = specials.tokens().cloned().collect();
            let added = match specials.added_tokens_decoder.take() {
                Some(added) => added,
                None => open_added(dir, &known.iter().collect::<Vec<_>>())?,
            };
            let mut tokenizer = Self {
                rules: qwen_from_vocabulary(dir)?,
                dir: dir.to_owned(),
                words: BTreeMap::new(),
            };
            tokenizer.add(added)?;
            tokenizer
        };
        let pad = specials
            .pad_token
            .as_ref()
            .map_or(QWEN_PAD, Written::content);
        let pad = tokenizer.id(pad)?;
        Ok((tokenizer, pad))
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

    /// The ids of `text`, without a start or an end, of any length.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] when the vocabulary cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .rules
            .encode_fast(text, false)
            .map_err(|error| Error::invalid_file(&self.dir, error.to_string()))?;
        let ids = encoding.get_ids().iter();
        Ok(ids.flat_map(|&id| self.all_of(id)).collect())
    }

    /// The ids that replace one.
    fn all_of(&self, id: u32) -> std::ops::Range<u32> {
        id..id + self.words.get(&id).copied().unwrap_or(1)
    }

    /// Whether a piece of text is one token.
    pub(crate) fn knows(&self, token: &str) -> bool {
        matches!(self.encode(token).as_deref(), Ok([id]) if *id as usize >= self.base_vocab_size())
            || self.words.keys().any(|&id| {
                self.token(id)
                    .is_some_and(|known| known.eq_ignore_ascii_case(token))
            })
    }

    /// Adds a word `<name>` that stands for `count` tokens, and returns the id of the first; the others follow. As in
    /// diffusers, they are called `<name>_1` and so on.
    ///
    /// # Errors
    /// [`Error::Setting`] if the word exists already.
    pub(crate) fn add_word(&mut self, name: &str, count: usize) -> Result<u32> {
        let first = u32::try_from(self.vocab_size()).unwrap_or(u32::MAX);
        let number = |number: usize| match number {
            0 => format!("<{name}>"),
            _ => format!("<{name}>_{number}"),
        };
        let tokens: Vec<AddedToken> = (0..count)
            .map(|place| AddedToken::from(number(place), false))
            .collect();
        let known = self.rules.get_added_tokens_decoder();
        let is_known = |token: &AddedToken| {
            known
                .values()
                .any(|old| old.content.eq_ignore_ascii_case(&token.content))
        };
        if let Some(token) = tokens.iter().find(|token| is_known(token)) {
            return Err(Error::Setting {
                name: "embedding",
                expected: "a word that is not in the vocabulary; NAME=FILE gives it another name"
                    .to_owned(),
                found: format!("`{}`", token.content),
            });
        }
        self.rules.add_tokens(&tokens);
        self.words.insert(first, u32::try_from(count).unwrap_or(1));
        Ok(first)
    }

    /// The ids of the words of `text`, each with the byte offset at which its token ends.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub(crate) fn encode_with_ends(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let encoding = self
            .rules
            .encode(text, false)
            .map_err(|error| Error::invalid_file(&self.dir, error.to_string()))?;
        let ends = encoding.get_offsets().iter().map(|(_, end)| *end);
        let ids = encoding.get_ids().iter().zip(ends);
        Ok(ids
            .flat_map(|(&id, end)| self.all_of(id).map(move |id| (id, end)))
            .collect())
    }

    /// Adds tokens, whose ids must be the next ones.
    fn add(&mut self, added: BTreeMap<u32, WrittenToken>) -> Result<()> {
        let (ids, tokens): (Vec<u32>, Vec<AddedToken>) =
            (added.into_iter().map(|(id, token)| (id, token.into()))).unzip();
        self.rules.add_tokens(&tokens);
        for (id, token) in ids.into_iter().zip(&tokens) {
            let found = self.rules.token_to_id(&token.content);
            if found != Some(id) {
                let found = found.map_or("none".to_owned(), |id| id.to_string());
                let reason = format!(
                    "the added token {:?} has the id {id}, but the vocabulary gives it {found}: gaps between ids \
                     are not supported",
                    token.content
                );
                return Err(Error::invalid_file(&self.dir, reason));
            }
        }
        Ok(())
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

    /// The number of tokens, including special and added ones; ids are below it.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.rules.get_vocab_size(true)
    }

    /// The number of tokens of the byte pair encoding, without added ones.
    #[must_use]
    pub fn base_vocab_size(&self) -> usize {
        self.rules.get_vocab_size(false)
    }

    /// The vocabulary's piece for `id`, such as CLIP's with `</w>` if it ends a word.
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
    /// Opens the folder `dir`: `tokenizer.json` if present, else `vocab.json` and
    /// `merges.txt`. As in transformers, `tokenizer_config.json` gives the special tokens, the length,
    /// and in `added_tokens_decoder` the tokens added to the vocabulary. Without that field,
    /// `special_tokens_map.json` overrides it, and `added_tokens.json` and `tokenizer.json` give the added
    /// tokens.
    ///
    /// # Errors
    /// When a file is missing or damaged, a special token is not in the vocabulary, or the id of an added
    /// token is not the next one.
    pub fn open(dir: &Path) -> Result<Self> {
        let read = |name: &str| match dir.join(name) {
            path if path.exists() => read_config::<Specials>(&path),
            _ => Ok(Specials::default()),
        };
        let mut specials = read("tokenizer_config.json")?;
        specials.check(&dir.join("tokenizer_config.json"))?;
        let decoder = specials.added_tokens_decoder.take();
        let configured = specials.additional_special_tokens.clone();
        if decoder.is_none() {
            specials = specials.overridden_by(read("special_tokens_map.json")?);
        }
        let content = |token: &Option<Written>, default: &str| {
            (token.as_ref()).map_or_else(|| default.to_owned(), |token| token.content().to_owned())
        };
        let bos = content(&specials.bos_token, "<|startoftext|>");
        let eos = content(&specials.eos_token, "<|endoftext|>");
        let unk = content(&specials.unk_token, &eos);
        let pad = content(&specials.pad_token, &eos);

        let path = dir.join("tokenizer.json");
        let (rules, of_rules) = match path.exists() {
            true => open_without_added(&path)?,
            false => (from_vocabulary(dir, &unk)?, BTreeMap::new()),
        };
        let mut tokenizer = Tokenizer {
            rules,
            dir: dir.to_owned(),
            words: BTreeMap::new(),
        };
        let added = match decoder {
            Some(added) => added,
            None => {
                // transformers 5 does not treat tokens that only the map adds as special here.
                let further = configured.iter().chain(&specials.extra_special_tokens);
                let known: Vec<&Written> = (specials.named())
                    .chain(further.flat_map(Further::tokens))
                    .collect();
                let mut added = open_added(dir, &known)?;
                added.extend(of_rules);
                added
            }
        };
        tokenizer.add(added)?;
        tokenizer.id(&unk)?;
        let [bos_id, eos_id, pad_id] = [&bos, &eos, &pad].map(|token| tokenizer.id(token));
        let (bos_id, eos_id, pad_id) = (bos_id?, eos_id?, pad_id?);
        let known = tokenizer.rules.get_added_tokens_decoder();
        let is_new = |token: &AddedToken| !known.values().any(|old| old.content == token.content);
        let named = [bos, eos, unk, pad].map(|token| AddedToken::from(token, true));
        let specials_of_files = specials.tokens().cloned().map(Written::special);
        let rest: Vec<AddedToken> = specials_of_files.chain(named).filter(is_new).collect();
        tokenizer.rules.add_tokens(&rest);
        Ok(Self {
            tokenizer,
            bos: bos_id,
            eos: eos_id,
            pad: pad_id,
            model_max_length: specials
                .model_max_length
                .map_or(DEFAULT_LENGTH, bounded_length),
        })
    }

    /// Opens a vocabulary, whose prompts may be padded with another token than its own.
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

    /// The tokenizer.
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
    /// [`model_max_length`](Self::model_max_length); `tokens` that do not fit are cut off.
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

    /// The id that pads a prompt: the end token for CLIP ViT-L, `"!"` (0) for OpenCLIP.
    #[must_use]
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// The number of ids in a prompt, including start and end.
    #[must_use]
    pub fn model_max_length(&self) -> usize {
        self.model_max_length
    }
}

/// A plausible length, or [`DEFAULT_LENGTH`] for "no limit".
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

/// Opens a `tokenizer.json`, without the truncation and padding that it may request.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::InvalidFile`] when it is damaged.
pub(crate) fn open_tokenizer_json(path: &Path) -> Result<Rules> {
    let invalid = |error: tokenizers::Error| Error::invalid_file(path, error.to_string());
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    // The library panics if a decoder is not JSON.
    serde_json::from_str::<IgnoredAny>(&text)
        .map_err(|error| Error::invalid_file(path, format!("not valid JSON: {error}")))?;
    let mut tokenizer: Rules = text.parse().map_err(invalid)?;
    tokenizer.with_truncation(None).map_err(invalid)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// The same without the added tokens, and these by their ids.
fn open_without_added(path: &Path) -> Result<(Rules, BTreeMap<u32, WrittenToken>)> {
    #[derive(Deserialize)]
    struct WithId {
        id: u32,
        #[serde(flatten)]
        token: WrittenToken,
    }
    let mut file: Value = read_config(path)?;
    let added = file.get_mut("added_tokens").map(Value::take);
    let added: Option<Vec<WithId>> = from_value(added.unwrap_or_default(), path)?;
    if let Some(file) = file.as_object_mut() {
        file.insert("added_tokens".to_owned(), json!([]));
        file.insert("truncation".to_owned(), Value::Null);
        file.insert("padding".to_owned(), Value::Null);
    }
    let rules = (file.to_string().parse::<Rules>())
        .map_err(|error| Error::invalid_file(path, error.to_string()))?;
    let added = added.into_iter().flatten();
    Ok((rules, added.map(|added| (added.id, added.token)).collect()))
}

/// The tokens in `added_tokens.json`, of which those among `specials` are special.
fn open_added(dir: &Path, specials: &[&Written]) -> Result<BTreeMap<u32, WrittenToken>> {
    let path = dir.join("added_tokens.json");
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let ids: BTreeMap<String, u32> = read_config(&path)?;
    let is_special = |content: &str| specials.iter().any(|token| token.content() == content);
    let token = |content: String| WrittenToken {
        special: is_special(&content),
        content,
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: None,
    };
    Ok(ids
        .into_iter()
        .map(|(content, id)| (id, token(content)))
        .collect())
}

/// The vocabulary of `vocab.json` and the pairs of `merges.txt` of `dir`.
fn vocabulary_and_merges(dir: &Path) -> Result<(Vocab, Vec<(String, String)>)> {
    let vocab_path = dir.join("vocab.json");
    let vocab: BTreeMap<String, u32> = read_config(&vocab_path)?;
    let merges_path = dir.join("merges.txt");
    let text = std::fs::read_to_string(&merges_path).map_err(Error::io(&merges_path))?;
    let merges = text
        .trim_start_matches('\u{feff}')
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
    Ok((vocab.into_iter().collect(), merges))
}

/// Qwen's tokenizer around the `vocab.json` and `merges.txt` of `dir`.
fn qwen_from_vocabulary(dir: &Path) -> Result<Rules> {
    let (vocab, merges) = vocabulary_and_merges(dir)?;
    let invalid = |error: tokenizers::Error| Error::invalid_file(dir, error.to_string());
    let bpe = BPE::builder().vocab_and_merges(vocab, merges);
    let words = SplitPattern::Regex(QWEN_WORDS.to_owned());
    let split = Split::new(words, SplitDelimiterBehavior::Isolated, false).map_err(invalid)?;
    let bytes = ByteLevel::new(false, true, false);
    let mut tokenizer = Rules::new(bpe.build().map_err(invalid)?);
    tokenizer
        .with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(PreTokenizers::new(vec![split.into(), bytes.into()])))
        .with_decoder(Some(bytes));
    Ok(tokenizer)
}

/// CLIP's tokenizer around the `vocab.json` and `merges.txt` of `dir`.
fn from_vocabulary(dir: &Path, unk: &str) -> Result<Rules> {
    let (vocab, merges) = vocabulary_and_merges(dir)?;
    let invalid = |error: tokenizers::Error| Error::invalid_file(dir, error.to_string());
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
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
    fn what_would_be_read_otherwise_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        for name in ["vocab.json", "merges.txt"] {
            std::fs::copy(golden("files").join(name), folder.path().join(name)).unwrap();
        }
        let open = || ClipTokenizer::open(folder.path());
        let message = || open().unwrap_err().to_string();
        for (config, expected) in [
            (
                r#"{"padding_side": "left"}"#,
                "field `padding_side`: expected right",
            ),
            (r#"{"truncation_side": "left"}"#, "field `truncation_side`"),
            (
                r#"{"split_special_tokens": true}"#,
                "field `split_special_tokens`",
            ),
            (
                r#"{"bos_token": "<start>"}"#,
                "special token \"<start>\" is not in",
            ),
            (
                r#"{"added_tokens_decoder": {"x": {"content": "y"}}}"#,
                "expected key to be a number",
            ),
            (
                r#"{"added_tokens_decoder": {"670": {"content": "<x>"}}}"#,
                "the added token \"<x>\" has the id 670, but the vocabulary gives it 663",
            ),
        ] {
            write("tokenizer_config.json", config);
            assert!(message().contains(expected), "{}", message());
        }
        write(
            "tokenizer_config.json",
            r#"{"padding_side": "right", "model_max_length": 77}"#,
        );
        write("added_tokens.json", r#"{"<x>": 663, "<y>": 665}"#);
        assert!(
            message().contains("\"<y>\" has the id 665"),
            "{}",
            message()
        );
        write("added_tokens.json", r#"{"<y>": 664, "<x>": 663}"#);
        let tokenizer = open().unwrap().into_tokenizer();
        assert_eq!(tokenizer.encode("<y><x>").unwrap(), [664, 663]);
        assert_eq!(
            (tokenizer.vocab_size(), tokenizer.base_vocab_size()),
            (665, 663)
        );
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
