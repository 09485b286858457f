//! Watches long work: the progress bar, notices, stage times, and requests to stop.

use std::fmt::Display;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use difference_inversion::util::progress::{LossTerms, Progress, Stage};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::terminal;

pub(crate) use super::signals::{catch_interrupts, stopping};

/// The time of each stage.
pub(crate) type StageTimes = Vec<(Stage, Duration)>;

/// Counts that take less than this get no bar.
const PATIENCE: Duration = Duration::from_millis(700);

/// Shows progress and remembers what should go into `run.json`.
pub(crate) struct Watcher {
    /// Whether bars are drawn.
    terminal: bool,
    /// Whether lines are printed in place of bars.
    plain: bool,
    /// The bar of the current stage. There is none between stages, so no stale bar is shown.
    bar: Option<ProgressBar>,
    current: Option<(Stage, Instant)>,
    /// When the current count began.
    counting: Option<Instant>,
    last_loss: Option<LossTerms>,
    times: StageTimes,
    notices: Vec<String>,
    /// Captions made since the last line about them, and the time they took.
    captions: (usize, Duration),
}

impl Watcher {
    /// A watcher that draws a bar on a terminal, and otherwise prints a line per stage, unless
    /// `quiet`.
    pub(crate) fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let quiet = quiet || terminal::writes_json_lines();
        Self {
            terminal: terminal && !quiet,
            plain: !terminal && !quiet,
            bar: None,
            current: None,
            counting: None,
            last_loss: None,
            times: Vec::new(),
            notices: Vec::new(),
            captions: (0, Duration::ZERO),
        }
    }

    /// Handles a message from the library.
    pub(crate) fn observe(&mut self, progress: &Progress) -> ControlFlow<()> {
        if terminal::writes_json_lines() && matches!(progress, Progress::Step { .. }) {
            terminal::event(progress);
        }
        match progress {
            Progress::Step {
                stage,
                done,
                total,
                loss,
            } => {
                if self.current.is_none_or(|(current, _)| current != *stage) {
                    self.begin(*stage, *done, *total);
                }
                self.last_loss = loss.or(self.last_loss);
                if let Some(bar) = &self.bar {
                    bar.set_length(*total as u64);
                    bar.set_position(*done as u64);
                    if let Some(loss) = loss {
                        bar.set_message(format!("loss {:.4}", loss.total));
                    }
                }
                if done == total {
                    self.end_stage(*total);
                }
            }
            Progress::Preview { picture } if terminal::writes_json_lines() => {
                terminal::preview(picture);
            }
            Progress::Notice { message } => self.notice(message),
            _ => {}
        }
        if stopping() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    /// Shows how many of `total` are done, once that takes a while; the last call reports completion.
    pub(crate) fn count(&mut self, what: &'static str, done: usize, total: usize) {
        let since = *self.counting.get_or_insert_with(Instant::now);
        if done >= total {
            self.counting = None;
            self.clear();
        } else if since.elapsed() > PATIENCE {
            if self.bar.is_none() {
                self.show(Stage::Read, what.to_owned(), total);
                if self.plain && done < total {
                    terminal::message(format_args!("{what}: {done} of {total} so far"));
                    self.counting = Some(Instant::now() + Duration::from_secs(60));
                }
            }
            if let Some(bar) = &self.bar {
                bar.set_position(done as u64);
            }
        }
    }

    /// Shows the user all of these notices.
    pub(crate) fn notices(&mut self, notices: impl IntoIterator<Item = String>) {
        notices.into_iter().for_each(|notice| self.notice(&notice));
    }

    /// Shows the user a note above the progress bar, and keeps it for `run.json`.
    pub(crate) fn notice(&mut self, notice: &str) {
        if self.notices.iter().any(|told| told == notice) {
            return; // such as of every picture
        }
        if terminal::writes_json_lines() {
            let message = notice.to_owned();
            terminal::event(&Progress::Notice { message });
        } else {
            self.above(|| terminal::message(format_args!("note: {notice}")));
        }
        self.notices.push(notice.to_owned());
    }

    /// Prints a line of results, above the progress bar.
    pub(crate) fn result(&self, text: impl Display) -> anyhow::Result<()> {
        self.above(|| terminal::line(text))
    }

    /// Prints a message, unless quiet.
    pub(crate) fn say(&self, text: &str) {
        if self.terminal || self.plain {
            self.above(|| terminal::message(text));
        }
    }

    /// Ends the watching; returns the time of each stage, and the notices.
    pub(crate) fn finish(mut self) -> (StageTimes, Vec<String>) {
        self.captions_made();
        self.clear();
        let Self { times, notices, .. } = &mut self;
        (std::mem::take(times), std::mem::take(notices))
    }

    fn begin(&mut self, stage: Stage, done: usize, total: usize) {
        if stage != Stage::Caption {
            self.captions_made();
        }
        self.current = Some((stage, Instant::now()));
        self.last_loss = None;
        self.clear();
        self.show(stage, stage.to_string(), total);
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            bar.reset_eta();
        }
    }

    fn end_stage(&mut self, total: usize) {
        let Some((stage, started)) = self.current.take() else {
            return;
        };
        let time = started.elapsed();
        match self.times.iter_mut().find(|(known, _)| *known == stage) {
            Some((_, sum)) => *sum += time,
            None => self.times.push((stage, time)),
        }
        self.clear();
        if stage == Stage::Caption {
            self.captions.0 += total;
            self.captions.1 += time;
            return;
        }
        let loss = self
            .last_loss
            .map(|loss| format!(", loss {:.4}", loss.total));
        let amount = match stage {
            Stage::Download => terminal::size(total as u64),
            _ if total == 1 => "1 step".to_owned(),
            _ => format!("{total} steps"),
        };
        let line = format!(
            "{stage}: {amount} in {:.1} s{}",
            time.as_secs_f64(),
            loss.unwrap_or_default()
        );
        self.say(&line);
    }

    /// Draws a bar, on a terminal.
    fn show(&mut self, stage: Stage, what: String, total: usize) {
        if self.terminal {
            let bar =
                ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
            bar.set_style(style(template(stage)));
            bar.set_prefix(what);
            self.bar = Some(bar);
        }
    }

    /// Reports the captions that were made, in one line.
    fn captions_made(&mut self) {
        let (count, time) = std::mem::take(&mut self.captions);
        let pictures = if count == 1 { "picture" } else { "pictures" };
        if count > 0 {
            self.say(&format!(
                "{}: {count} {pictures} in {:.1} s",
                Stage::Caption,
                time.as_secs_f64()
            ));
        }
    }

    /// Removes the bar.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Prints something where no bar overwrites it.
    fn above<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }
}

impl Drop for Watcher {
    /// Removes the bar, so that an error is printed in its place.
    fn drop(&mut self) {
        self.clear();
    }
}

/// Denoising and learning have a rate worth reading; a handful of captions does not.
fn template(stage: Stage) -> &'static str {
    match stage {
        Stage::Download => {
            "{prefix:>12} {wide_bar:.blue/dim} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left"
        }
        Stage::Caption | Stage::Read => "{prefix:>12} {wide_bar:.blue/dim} {pos}/{len} {msg}",
        _ => "{prefix:>12} {wide_bar:.blue/dim} {pos}/{len} {per_sec}, {eta} left {msg}",
    }
}

/// The style of a progress bar. A malformed template is replaced by indicatif's own; tests draw each.
pub(crate) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━━─")
}

/// The text of a bar with this template at 3 of 4; indicatif leaves out unknown keys.
#[cfg(test)]
pub(crate) fn drawn(template: &str) -> String {
    drawn_at(120, template)
}

/// The same on a terminal of `width` columns.
#[cfg(test)]
pub(crate) fn drawn_at(width: u16, template: &str) -> String {
    use std::io::Result;
    use std::sync::{Arc, Mutex, PoisonError};

    #[derive(Debug)]
    struct Screen(Arc<Mutex<String>>, u16);

    impl indicatif::TermLike for Screen {
        fn width(&self) -> u16 {
            self.1
        }
        fn move_cursor_up(&self, _: usize) -> Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> Result<()> {
            let mut screen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            screen.push_str(text);
            Ok(())
        }
        fn clear_line(&self) -> Result<()> {
            let mut screen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            screen.clear();
            Ok(())
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
    }

    let screen = Arc::default();
    let target = ProgressDrawTarget::term_like(Box::new(Screen(Arc::clone(&screen), width)));
    let bar = ProgressBar::with_draw_target(Some(4), target);
    bar.set_style(style(template));
    bar.set_prefix("PREFIX");
    bar.set_message("MESSAGE");
    bar.set_position(3);
    bar.abandon();
    let text = screen.lock().unwrap_or_else(PoisonError::into_inner);
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(stage: Stage, done: usize, total: usize) -> Progress {
        Progress::Step {
            stage,
            done,
            total,
            loss: None,
        }
    }

    #[test]
    fn every_stage_is_timed_once_and_notices_are_kept() {
        let mut watcher = Watcher::new(true);
        for stage in [Stage::Caption, Stage::Learn, Stage::Caption] {
            for done in 0..=2 {
                assert!(watcher.observe(&step(stage, done, 2)).is_continue());
            }
        }
        watcher.notice("equal captions");
        watcher.notice("equal captions");
        let (times, notices) = watcher.finish();
        let stages: Vec<Stage> = times.iter().map(|(stage, _)| *stage).collect();
        assert_eq!(stages, [Stage::Caption, Stage::Learn]);
        assert_eq!(notices, ["equal captions"]);
    }

    #[test]
    fn bars_fit_the_terminal() {
        for stage in [Stage::Caption, Stage::Download, Stage::Learn] {
            for width in [80, 120] {
                let text = drawn_at(width, template(stage));
                assert!(text.contains("━━"), "{text}");
                assert!(text.chars().count() <= width.into(), "{width}: {text}");
            }
        }
    }

    #[test]
    fn bars_show_how_far_each_stage_is() {
        for (stage, expected) in [
            (Stage::Caption, "─ 3/4 MESSAGE"),
            (Stage::Download, "─ 3 B/4 B "),
            (Stage::Learn, "─ 3/4 "),
        ] {
            let text = drawn(template(stage));
            assert!(text.contains(" PREFIX ━━"), "{text}");
            assert!(text.contains(expected), "{text}");
            let timed = stage != Stage::Caption;
            assert_eq!(text.contains("/s, "), timed, "{text}");
            assert_eq!(text.contains(" left"), timed, "{text}");
            assert_eq!(text.contains("MESSAGE"), stage != Stage::Download, "{text}");
        }
    }
}
