//! The vocabulary of a SentencePiece model (`spiece.model`), which is all that T5's folders have without a
//! `tokenizer.json`.

use std::path::Path;

use prost::Message;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{AddedToken, Tokenizer as Rules};

use crate::{Error, Result};

/// What stands for a space.
const SPACE: char = '▁';
/// The tokens that T5 has beyond the file's: `<extra_id_99>` down to `<extra_id_0>`.
const EXTRA: usize = 100;

/// The fields that are read of SentencePiece's `ModelProto`
/// ([`sentencepiece_model.proto`](https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto)).
#[derive(Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

#[derive(Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
}

#[derive(Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
}

/// Values of `TrainerSpec::model_type` and `Piece::kind`.
const UNIGRAM: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;

/// Opens a model as transformers' `T5Tokenizer` does: with T5's extra tokens, and split at white space.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::InvalidFile`] when it is damaged or not of T5's kind.
pub(crate) fn open(path: &Path) -> Result<Rules> {
    let invalid = |reason: String| Error::invalid_file(path, reason);
    let failed = |error: tokenizers::Error| invalid(error.to_string());
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let model = ModelProto::decode(bytes.as_slice())
        .map_err(|error| invalid(format!("not a SentencePiece model: {error}")))?;
    let kind = model.trainer_spec.unwrap_or_default().model_type();
    if kind != UNIGRAM {
        return Err(invalid(format!(
            "its `model_type` is {kind}, where T5's is {UNIGRAM}, a unigram model"
        )));
    }
    let (mut vocabulary, mut special, mut unknown) = (Vec::new(), Vec::new(), None);
    for (id, piece) in model.pieces.into_iter().enumerate() {
        let (text, score, kind) = (piece.piece().to_owned(), piece.score(), piece.kind());
        if text.is_empty() || !score.is_finite() {
            return Err(invalid(format!(
                "piece {id} is {text:?} with a score of {score}"
            )));
        }
        if kind == UNKNOWN {
            unknown = unknown.or(Some(id));
        }
        if [UNKNOWN, CONTROL].contains(&kind) {
            special.push(text.clone());
        }
        vocabulary.push((text, f64::from(score)));
    }
    let unknown =
        unknown.ok_or_else(|| invalid("it has no piece for what is unknown".to_owned()))?;
    let extra = (0..EXTRA)
        .rev()
        .map(|number| format!("<extra_id_{number}>"));
    for token in extra {
        special.push(token.clone());
        vocabulary.push((token, 0.0));
    }
    let mut rules = Rules::new(Unigram::from(vocabulary, Some(unknown), false).map_err(failed)?);
    let normalizer = model.normalizer_spec.unwrap_or_default();
    if let Some(map) = normalizer
        .precompiled_charsmap
        .filter(|map| !map.is_empty())
    {
        let damaged = || invalid("its `precompiled_charsmap` is damaged".to_owned());
        if !is_whole(&map) {
            return Err(damaged());
        }
        let normalizer = Precompiled::from(&map).map_err(|_| damaged())?;
        rules.with_normalizer(Some(normalizer));
    }
    rules.with_pre_tokenizer(Some(Sequence::new(vec![
        WhitespaceSplit.into(),
        Metaspace::new(SPACE, PrependScheme::Always, true).into(),
    ])));
    let special: Vec<AddedToken> = (special.into_iter())
        .map(|token| AddedToken::from(token, true))
        .collect();
    rules.add_special_tokens(&special);
    Ok(rules)
}

/// Whether whatever is looked up in a `precompiled_charsmap` is inside it: the library that reads it takes that for
/// granted. It holds the length of a trie in bytes, the trie, and the texts that its values point to
/// ([darts-clone](https://github.com/s-yata/darts-clone): a double array of 32-bit units).
fn is_whole(map: &[u8]) -> bool {
    let Some((length, rest)) = map.split_first_chunk() else {
        return false;
    };
    let Some((trie, texts)) = rest.split_at_checked(u32::from_le_bytes(*length) as usize) else {
        return false;
    };
    let (units, remainder) = trie.as_chunks();
    let units: Vec<usize> = (units.iter())
        .map(|unit| u32::from_le_bytes(*unit) as usize)
        .collect();
    let (Ok(texts), []) = (std::str::from_utf8(texts), remainder) else {
        return false;
    };
    // Of a unit: where its children begin, relative to itself; whether it has a value; the value; its own letter.
    let children = |place: usize, unit: usize| place ^ (unit >> 10) << ((unit & 1 << 9) >> 6);
    let has_value = |unit: usize| unit >> 8 & 1 == 1;
    let value = |unit: usize| unit & ((1 << 31) - 1);
    let letter = |unit: usize| unit & (1 << 31 | 0xff);
    let mut seen = vec![false; units.len()];
    let mut open = vec![0];
    while let Some(place) = open.pop() {
        let Some(&unit) = units.get(place) else {
            return false;
        };
        if std::mem::replace(&mut seen[place], true) {
            continue;
        }
        let first = children(place, unit);
        // Any letter may be asked for.
        if first | 0xff >= units.len() {
            return false;
        }
        if place > 0 && has_value(unit) && !texts.is_char_boundary(value(units[first])) {
            return false;
        }
        let others = (1..=0xff).map(|byte| (first ^ byte, byte));
        open.extend(
            others
                .filter(|(child, byte)| letter(units[*child]) == *byte)
                .map(|(child, _)| child),
        );
    }
    !units.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_model_of_t5_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spiece.model");
        let piece = |text: &str, score: f32, kind: i32| Piece {
            piece: Some(text.to_owned()),
            score: Some(score),
            kind: Some(kind),
        };
        let pieces = || vec![piece("<unk>", 0.0, UNKNOWN), piece("▁a", -1.0, 1)];
        let message = |model: ModelProto| {
            std::fs::write(&path, model.encode_to_vec()).unwrap();
            open(&path).unwrap_err().to_string()
        };
        let bpe = message(ModelProto {
            pieces: pieces(),
            trainer_spec: Some(TrainerSpec {
                model_type: Some(2),
            }),
            normalizer_spec: None,
        });
        assert!(bpe.contains("`model_type` is 2"), "{bpe}");
        for (changed, expected) in [
            (vec![piece("▁a", -1.0, 1)], "no piece for what is unknown"),
            (vec![piece("", -1.0, 1)], "piece 0"),
            (vec![piece("a", f32::NAN, 1)], "NaN"),
        ] {
            let message = message(ModelProto {
                pieces: changed,
                ..ModelProto::default()
            });
            assert!(message.contains(expected), "{message}");
        }
        for map in [
            vec![1],
            vec![8, 0, 0, 0, 1],
            vec![4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        ] {
            let message = message(ModelProto {
                pieces: pieces(),
                trainer_spec: None,
                normalizer_spec: Some(NormalizerSpec {
                    precompiled_charsmap: Some(map),
                }),
            });
            assert!(message.contains("`precompiled_charsmap`"), "{message}");
        }
        std::fs::write(&path, b"version 1").unwrap();
        let message = open(&path).unwrap_err().to_string();
        assert!(message.contains("not a SentencePiece model"), "{message}");
    }
}
