//! BERT's tokenizer: lower-cased text to word pieces, as transformers' `BertTokenizer`.

use std::path::Path;

use serde::Deserialize;
use tokenizers::decoders::wordpiece::WordPiece as Decoder;
use tokenizers::models::bpe::Vocab;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{AddedToken, Tokenizer};

use crate::models::text::tokenizer::open_tokenizer_json;
use crate::weights::read_config;
use crate::{Error, Result};

/// The token of a word that is not in the vocabulary.
const UNKNOWN: &str = "[UNK]";
/// The prefix of a piece that continues a word.
const CONTINUES: &str = "##";
/// The tokens that are not words.
const SPECIAL: [&str; 5] = ["[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]"];

/// The relevant fields of `tokenizer_config.json`, with transformers' defaults.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct BertTokenizerConfig {
    do_lower_case: bool,
    tokenize_chinese_chars: bool,
    strip_accents: Option<bool>,
}

impl Default for BertTokenizerConfig {
    fn default() -> Self {
        Self {
            do_lower_case: true,
            tokenize_chinese_chars: true,
            strip_accents: None,
        }
    }
}

/// Opens the tokenizer in folder `dir`: `tokenizer.json` if present, else `vocab.txt`, with one piece per
/// line.
///
/// # Errors
/// When a file is missing or damaged.
pub(super) fn open_bert_tokenizer(dir: &Path) -> Result<Tokenizer> {
    let json = dir.join("tokenizer.json");
    if json.exists() {
        return open_tokenizer_json(&json);
    }
    let config = match dir.join("tokenizer_config.json") {
        path if path.exists() => read_config(&path)?,
        _ => BertTokenizerConfig::default(),
    };
    let path = dir.join("vocab.txt");
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let pieces = text.lines().map(|line| line.trim_end().to_owned());
    let vocab: Vocab = pieces.zip(0..).collect();
    if !vocab.contains_key(UNKNOWN) {
        let reason = format!("not a vocabulary of BERT: no line {UNKNOWN}");
        return Err(Error::invalid_file(&path, reason));
    }
    let special: Vec<AddedToken> = (SPECIAL.iter().filter(|token| vocab.contains_key(**token)))
        .map(|token| AddedToken::from(*token, true))
        .collect();
    let model = WordPiece::builder()
        .vocab(vocab)
        .unk_token(UNKNOWN.to_owned())
        .continuing_subword_prefix(CONTINUES.to_owned())
        .build()
        .map_err(|error| Error::invalid_file(&path, error.to_string()))?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(BertNormalizer::new(
            true,
            config.tokenize_chinese_chars,
            config.strip_accents,
            config.do_lower_case,
        )))
        .with_pre_tokenizer(Some(BertPreTokenizer))
        .with_decoder(Some(Decoder::new(CONTINUES.to_owned(), true)));
    tokenizer.add_special_tokens(&special);
    Ok(tokenizer)
}
