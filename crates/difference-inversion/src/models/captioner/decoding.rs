//! Choosing words: greedy and beam search, as in transformers' `generate`.

use crate::Result;

/// When beam search stops, once as many texts are finished as there are beams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// When the best unfinished beam, at its current length, scores below the worst finished text
    /// (transformers' `False`, the default).
    #[default]
    Heuristic,
    /// At once (`True`).
    WhenFull,
    /// When no unfinished beam could still win, whatever its length (`"never"`).
    Never,
}

/// How a text is generated.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// Beams; 1 means greedy search.
    pub num_beams: usize,
    /// The longest text, in tokens.
    pub max_new_tokens: usize,
    /// A text's score is its log-probability divided by its length to this power.
    pub length_penalty: f64,
    /// When beam search stops.
    pub early_stopping: EarlyStopping,
    /// Words that the text continues; they are not part of it.
    pub prompt: Option<String>,
}

impl Default for GenerationConfig {
    /// The settings of BLIP-2's own code (LAVIS): 5 beams, up to 30 tokens.
    fn default() -> Self {
        Self {
            num_beams: 5,
            max_new_tokens: 30,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::default(),
            prompt: None,
        }
    }
}

/// A language model that continues some texts of equal length.
pub trait NextLogits {
    /// Continues text `rows[i]` of its texts by `tokens[i]`, keeps the results in this order, and returns the
    /// logits of the next token of each.
    ///
    /// # Errors
    /// If the model fails.
    fn next_logits(&mut self, rows: &[usize], tokens: &[u32]) -> Result<Vec<Vec<f32>>>;
}

/// The tokens that follow the one text of `model`, whose next logits are `first`; up to and including the
/// first of `eos`, or `max_new_tokens`.
///
/// # Errors
/// If the model fails.
pub fn generate(
    model: &mut impl NextLogits,
    first: Vec<f32>,
    eos: &[u32],
    config: &GenerationConfig,
) -> Result<Vec<u32>> {
    match config.num_beams {
        0 | 1 => greedy_search(model, first, eos, config.max_new_tokens),
        _ => beam_search(model, first, eos, config),
    }
}

fn greedy_search(
    model: &mut impl NextLogits,
    first: Vec<f32>,
    eos: &[u32],
    max_new_tokens: usize,
) -> Result<Vec<u32>> {
    let (mut tokens, mut logits) = (Vec::new(), first);
    while tokens.len() < max_new_tokens {
        let Some(&(_, token)) = largest(1, numbered(&logits)).first() else {
            break;
        };
        tokens.push(token);
        if eos.contains(&token) || tokens.len() == max_new_tokens {
            break;
        }
        logits = model.next_logits(&[0], &[token])?.pop().unwrap_or_default();
    }
    Ok(tokens)
}

/// The score of a forbidden token; finite, so that sums with it stay ordered.
const NEVER: f32 = -1e9;

/// A text, its score, and whether it is finished.
#[derive(Clone, Debug)]
struct Text {
    tokens: Vec<u32>,
    score: f32,
    is_finished: bool,
}

/// A running text with one more token.
#[derive(Debug)]
struct Candidate {
    tokens: Vec<u32>,
    score: f32,
    /// The running text that it continues.
    row: usize,
    /// Whether it ends here, by its token or for its length.
    ends: bool,
}

/// The running texts and the best finished ones; as many of each as there are beams.
struct Beams<'a> {
    config: &'a GenerationConfig,
    eos: &'a [u32],
    running: Vec<Text>,
    finished: Vec<Text>,
    can_improve: bool,
}

/// `_beam_search` of transformers for one text, without sampling.
fn beam_search(
    model: &mut impl NextLogits,
    first: Vec<f32>,
    eos: &[u32],
    config: &GenerationConfig,
) -> Result<Vec<u32>> {
    let mut beams = Beams::new(eos, config);
    let mut logits = vec![first; config.num_beams];
    for length in 1..=config.max_new_tokens {
        let candidates = beams.candidates(&logits, length);
        beams.finish(&candidates, length);
        let ends_everywhere = candidates.iter().all(|candidate| candidate.ends);
        let (mut rows, tokens) = beams.go_on(candidates);
        if ends_everywhere || beams.is_done(length) {
            break;
        }
        if length == 1 {
            rows.fill(0); // as yet, the model holds a single text
        }
        logits = model.next_logits(&rows, &tokens)?;
    }
    Ok(beams.finished.swap_remove(0).tokens)
}

impl<'a> Beams<'a> {
    fn new(eos: &'a [u32], config: &'a GenerationConfig) -> Self {
        let nothing = Text {
            tokens: Vec::new(),
            score: NEVER,
            is_finished: false,
        };
        let finished = vec![nothing; config.num_beams];
        let mut running = finished.clone();
        running[0].score = 0.0; // the others are its copies
        Self {
            config,
            eos,
            running,
            finished,
            can_improve: true,
        }
    }

    /// The best continuations to `length`, best first: enough of them that a full set of beams remains if the
    /// others end.
    fn candidates(&self, logits: &[Vec<f32>], length: usize) -> Vec<Candidate> {
        let count = self.config.num_beams * (1 + self.eos.len()).max(2);
        let log_probs: Vec<Vec<f32>> = logits.iter().map(|row| log_softmax(row)).collect();
        let scores = self.running.iter().zip(&log_probs).enumerate();
        let scores = scores.flat_map(|(row, (text, log_probs))| {
            numbered(log_probs).map(move |(log_prob, token)| (log_prob + text.score, (row, token)))
        });
        let continued = |(score, (row, token)): (f32, (usize, u32))| {
            let before: &Text = &self.running[row];
            Candidate {
                tokens: before.tokens.iter().copied().chain([token]).collect(),
                score,
                row,
                ends: self.eos.contains(&token) || length == self.config.max_new_tokens,
            }
        };
        let best = largest(count, scores);
        best.into_iter().map(continued).collect()
    }

    /// Keeps the best texts that have ended; a candidate counts if it is among the best
    /// `num_beams`.
    fn finish(&mut self, candidates: &[Candidate], length: usize) {
        let num_beams = self.config.num_beams;
        let penalty = length_penalty(length, self.config.length_penalty);
        let closed = self.is_full() || !self.can_improve;
        let ended = candidates.iter().enumerate().map(|(rank, candidate)| {
            let is_finished = candidate.ends && rank < num_beams;
            let barred = u8::from(closed) + u8::from(!is_finished);
            Text {
                tokens: candidate.tokens.clone(),
                score: candidate.score / penalty + f32::from(barred) * NEVER,
                is_finished,
            }
        });
        let all = std::mem::take(&mut self.finished).into_iter().chain(ended);
        let best = largest(num_beams, all.map(|text| (text.score, text)));
        self.finished = best.into_iter().map(|(_, text)| text).collect();
    }

    /// Continues with the best candidates that have not ended; returns the rows that they continue, and their new
    /// tokens.
    fn go_on(&mut self, candidates: Vec<Candidate>) -> (Vec<usize>, Vec<u32>) {
        let open = candidates.into_iter().map(|candidate| {
            let barred = f32::from(u8::from(candidate.ends)) * NEVER;
            (candidate.score + barred, candidate)
        });
        let kept = largest(self.config.num_beams, open);
        let steps = kept
            .iter()
            .filter_map(|(_, text)| Some((text.row, *text.tokens.last()?)))
            .unzip();
        let texts = kept.into_iter().map(|(score, candidate)| Text {
            tokens: candidate.tokens,
            score,
            is_finished: false,
        });
        self.running = texts.collect();
        steps
    }

    /// Whether no better text is possible, according to `early_stopping`.
    fn is_done(&mut self, length: usize) -> bool {
        let hoped_length = match self.config.early_stopping {
            EarlyStopping::Never if self.config.length_penalty > 0.0 => self.config.max_new_tokens,
            _ => length,
        };
        let best = self.running.first().map_or(NEVER, |text| text.score);
        let hope = best / length_penalty(hoped_length, self.config.length_penalty);
        let scores = self.finished.iter().map(|text| text.score);
        let worst = scores.fold(f32::INFINITY, f32::min);
        self.can_improve &= self
            .finished
            .iter()
            .any(|text| hope > if text.is_finished { worst } else { NEVER });
        self.is_full() || !self.can_improve
    }

    /// Whether enough texts are finished, if that is enough.
    fn is_full(&self) -> bool {
        self.config.early_stopping == EarlyStopping::WhenFull
            && self.finished.iter().all(|text| text.is_finished)
    }
}

/// The divisor of a log-probability.
#[expect(
    clippy::cast_possible_truncation,
    reason = "scores are in f32, as transformers has them"
)]
fn length_penalty(length: usize, exponent: f64) -> f32 {
    (length as f64).powf(exponent) as f32
}

/// Logits with their tokens.
fn numbered(logits: &[f32]) -> impl Iterator<Item = (f32, u32)> {
    logits.iter().copied().zip(0..)
}

/// The `count` items with the largest scores, best first; the earlier one for equal scores.
fn largest<T>(count: usize, items: impl Iterator<Item = (f32, T)>) -> Vec<(f32, T)> {
    let mut best: Vec<(f32, T)> = Vec::with_capacity(count + 1);
    for item in items {
        if best.len() == count && best.last().is_some_and(|last| item.0 <= last.0) {
            continue;
        }
        let at = best.partition_point(|(score, _)| *score >= item.0);
        best.insert(at, item);
        best.truncate(count);
    }
    best
}

/// Log-probabilities.
fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    let log_total = total.ln();
    logits.iter().map(|logit| logit - max - log_total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model whose next logits depend only on the last token.
    struct Chain(Vec<Vec<f32>>);

    impl NextLogits for Chain {
        fn next_logits(&mut self, _rows: &[usize], tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
            Ok(tokens
                .iter()
                .map(|&token| self.0[token as usize].clone())
                .collect())
        }
    }

    /// Probabilities to logits.
    fn logits(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    /// Token 0 ends a text. Greedy search picks 1 then 2 (0.6 × 0.4); the pair 2 then 3 (0.4 × 0.9) is likelier.
    fn chain() -> (Chain, Vec<f32>) {
        let rows = [
            [1.0, 0.0, 0.0, 0.0],
            [0.3, 0.0, 0.4, 0.3],
            [0.05, 0.05, 0.0, 0.9],
            [0.98, 0.01, 0.01, 0.0],
        ];
        (
            Chain(rows.iter().map(|row| logits(row)).collect()),
            logits(&[0.0, 0.6, 0.4, 0.0]),
        )
    }

    fn run(num_beams: usize, max_new_tokens: usize) -> Vec<u32> {
        let (mut model, first) = chain();
        let config = GenerationConfig {
            num_beams,
            max_new_tokens,
            ..Default::default()
        };
        generate(&mut model, first, &[0], &config).unwrap()
    }

    #[test]
    fn greedy_search_takes_the_likeliest_word_and_stops_at_the_end() {
        assert_eq!(run(1, 10), [1, 2, 3, 0]);
        assert_eq!(run(1, 2), [1, 2]);
    }

    #[test]
    fn beam_search_finds_the_likelier_text() {
        assert_eq!(run(2, 2), [2, 3]);
        assert_eq!(run(3, 10), [2, 3, 0]);
    }

    #[test]
    fn no_words_are_no_text() {
        assert!(run(1, 0).is_empty() && run(2, 0).is_empty());
    }

    #[test]
    fn the_largest_are_in_order_and_the_first_of_equals_wins() {
        let found = largest(
            3,
            [(1.0, 'a'), (3.0, 'b'), (2.0, 'c'), (3.0, 'd'), (0.0, 'e')].into_iter(),
        );
        let letters: String = found.into_iter().map(|(_, letter)| letter).collect();
        assert_eq!(letters, "bdc");
    }
}
