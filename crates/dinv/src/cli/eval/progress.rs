//! The progress of a run, and the time it will take.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget};

use super::super::terminal;
use super::super::watch::style;

/// The look of the bar.
const TEMPLATE: &str = "{prefix:>20} {wide_bar:.blue/dim} {pos}/{len} {msg}";

/// With more pictures than this, a run takes hours.
const MANY: usize = 300;

/// The work of one method.
#[derive(Debug, Clone, Default)]
struct Work {
    left: usize,
    /// The time of an analogy, relative to other methods.
    cost: f64,
    /// The mean time charged for an analogy, over those that existed before this run.
    charged: Option<f64>,
    /// The number of analogies that this run has ended, and their total time.
    ended: usize,
    seconds: f64,
}

impl Work {
    /// The expected time of an analogy. The charged time is a first guess: it counts learning that several
    /// methods share once for each.
    fn mean(&self) -> Option<f64> {
        match self.ended {
            0 => self.charged,
            ended => Some(self.seconds / ended as f64),
        }
    }
}

/// The progress of a run, drawn as a bar on a terminal and printed as lines elsewhere.
#[derive(Debug)]
pub(super) struct RunProgress {
    bar: Option<ProgressBar>,
    plain: bool,
    workers: usize,
    /// The time limit of each method, if any.
    time: Option<Duration>,
    total: usize,
    done: usize,
    methods: BTreeMap<String, Work>,
    notices: Vec<String>,
}

impl RunProgress {
    /// For `workers` in parallel; no method begins an analogy after `time`.
    pub(super) fn new(quiet: bool, workers: usize, time: Option<Duration>) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (terminal && !quiet).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.with_style(style(TEMPLATE))
        });
        Self {
            bar,
            plain: !terminal && !quiet,
            workers,
            time,
            total: 0,
            done: 0,
            methods: BTreeMap::new(),
            notices: Vec::new(),
        }
    }

    /// Announces the work of a method: the number of analogies left, the time of one relative to other methods, and
    /// the times charged for those already done.
    pub(super) fn plan(&mut self, method: &str, left: usize, cost: f64, seconds: &[f64]) {
        self.total += left;
        let work = Work {
            left,
            cost,
            charged: (!seconds.is_empty())
                .then(|| seconds.iter().sum::<f64>() / seconds.len() as f64),
            ..Work::default()
        };
        self.methods.insert(method.to_owned(), work);
    }

    /// Informs the user of the length of a long run.
    pub(super) fn announce(&mut self) {
        if self.total > MANY {
            let methods = self.methods.values().filter(|work| work.left > 0).count();
            self.notice(format!(
                "{} pictures are to be made, by {methods} methods; `--quick` makes a few, in minutes",
                self.total
            ));
        }
    }

    /// Reports that a method begins.
    pub(super) fn begin(&self, method: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(self.total as u64);
            bar.set_prefix(method.to_owned());
            bar.tick();
        }
    }

    /// Reports that a method begins no more analogies, though some may be left; `late` is whether its time
    /// is over.
    pub(super) fn leave(&mut self, method: &str, late: bool) {
        let Some(work) = self.methods.get_mut(method) else {
            return;
        };
        let left = std::mem::take(&mut work.left);
        self.total -= left;
        if late && left > 0 {
            self.say(&format!(
                "{method}: out of time, {left} analogies not begun"
            ));
        }
    }

    /// Reports that an analogy has ended, with the seconds a worker spent on it.
    pub(super) fn ended(&mut self, method: &str, name: &str, seconds: f64, failed: Option<&str>) {
        self.done += 1;
        if let Some(work) = self.methods.get_mut(method) {
            work.left = work.left.saturating_sub(1);
            work.ended += 1;
            work.seconds += seconds;
        }
        let left = match self.time_left() {
            Some(left) => format!("{} left", HumanDuration(left)),
            None => String::new(),
        };
        if let Some(reason) = failed {
            self.say(&format!("{method} {name}: failed: {reason}"));
        }
        match &self.bar {
            Some(bar) => {
                bar.set_length(self.total as u64);
                bar.set_position(self.done as u64);
                bar.set_prefix(method.to_owned());
                bar.set_message(left);
            }
            None if self.plain => terminal::message(format_args!(
                "{method} {name}: {seconds:.1} s, {} of {}, {left}",
                self.done, self.total
            )),
            None => {}
        }
    }

    /// Shows the user a note, once.
    pub(super) fn notice(&mut self, notice: String) {
        if !self.notices.contains(&notice) {
            self.say(&format!("note: {notice}"));
            self.notices.push(notice);
        }
    }

    pub(super) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| terminal::message(text)),
            None => terminal::message(text),
        }
    }

    pub(super) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }

    /// The remaining time if every method continues at its pace. The pace of methods that have none yet follows from
    /// that of the others and from the costs. No method begins an analogy after its time.
    fn time_left(&self) -> Option<Duration> {
        let known = self.methods.values();
        let known = known.filter_map(|work| Some((work.mean()?, work.cost)));
        let (means, costs): (Vec<f64>, Vec<f64>) = known.unzip();
        if means.is_empty() {
            return None;
        }
        let usual = means.iter().sum::<f64>() / costs.iter().sum::<f64>();
        let workers = self.workers as f64;
        let time = self.time.map_or(f64::INFINITY, |time| time.as_secs_f64());
        let seconds = self.methods.values().map(|work| {
            let mean = work.mean().unwrap_or(usual * work.cost);
            let budget = (time - work.seconds / workers).max(0.0);
            (mean * work.left as f64 / workers).min(budget + mean)
        });
        Duration::try_from_secs_f64(seconds.sum()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_shows_how_far_the_run_is() {
        let text = crate::cli::watch::drawn(TEMPLATE);
        assert!(text.contains(" PREFIX ━━"), "{text}");
        assert!(text.ends_with("─ 3/4 MESSAGE"), "{text}");
    }

    #[test]
    fn time_left_is_that_of_each_method_shared_among_the_workers() {
        let mut progress = RunProgress::new(true, 2, None);
        progress.plan("slow", 3, 1.5, &[]);
        progress.plan("quick", 10, 0.5, &[1.0, 1.0]);
        progress.plan("unknown", 4, 1.0, &[]);
        progress.ended("slow", "000", 7.0, None);
        // 2 · 7 s, 10 · 1 s, 4 · 4 s, by two workers
        assert_eq!(progress.time_left(), Some(Duration::from_secs(20)));
        assert_eq!((progress.done, progress.total), (1, 17));
        progress.leave("unknown", false);
        assert_eq!(progress.time_left(), Some(Duration::from_secs(12)));
        assert_eq!((progress.done, progress.total), (1, 13));
    }

    #[test]
    fn a_method_without_a_pace_takes_its_cost_into_account() {
        let mut progress = RunProgress::new(true, 1, None);
        progress.plan("usual", 2, 1.0, &[]);
        progress.plan("ten times as slow", 3, 10.0, &[]);
        progress.ended("usual", "000", 2.0, None);
        assert_eq!(progress.time_left(), Some(Duration::from_secs(2 + 60)));
    }

    #[test]
    fn no_method_begins_an_analogy_after_its_time() {
        let mut progress = RunProgress::new(true, 2, Some(Duration::from_secs(60)));
        progress.plan("slow", 100, 1.0, &[]);
        progress.plan("quick", 10, 1.0, &[1.0]);
        progress.ended("slow", "000", 30.0, None);
        // 60 s minus the time one of two workers has used, the analogy begun then, and 10 · 1 s by both
        assert_eq!(progress.time_left(), Some(Duration::from_secs(45 + 30 + 5)));
        progress.ended("slow", "001", 100.0, None);
        assert_eq!(progress.time_left(), Some(Duration::from_secs(65 + 5)));
    }

    #[test]
    fn what_was_charged_counts_until_something_has_ended() {
        let mut progress = RunProgress::new(true, 1, None);
        progress.plan("shares what it learned", 3, 1.0, &[20.0, 10.0]);
        assert_eq!(progress.time_left(), Some(Duration::from_secs(45)));
        progress.ended("shares what it learned", "000", 2.0, None);
        assert_eq!(progress.time_left(), Some(Duration::from_secs(4)));
    }
}
