//! Asks before a download, stating its total size and the free space on the disk.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use difference_inversion::hub::ModelId;

use super::signals;
use super::terminal::{self, Failure, size};
use super::watch::Watcher;

/// The interval at which a question checks whether it should stop waiting.
const TICK: Duration = Duration::from_millis(100);

/// Models to download, each with its bytes.
pub(crate) type Order = Vec<(ModelId, u64)>;

/// Refuses a download that does not fit on the disk, lists the models, and asks the user if there is a terminal;
/// `yes` answers for them.
pub(crate) fn ask(
    order: &Order,
    cache: &Path,
    yes: bool,
    watcher: &mut Watcher,
) -> anyhow::Result<()> {
    let total = order.iter().map(|(_, bytes)| bytes).sum();
    let free = free_space(cache);
    if let Some(free) = free.filter(|&free| free < total) {
        return Err(no_room(order, total, free, cache).into());
    }
    let asks = !yes && total > 0 && io::stdin().is_terminal() && io::stderr().is_terminal();
    if !asks && order.len() < 2 {
        return Ok(()); // each download is announced anyway
    }
    let room = free.map_or_else(String::new, |free| format!(", {} free", size(free)));
    let heading = format!("to download to {}{room}:", cache.display());
    let lines = order
        .iter()
        .map(|(id, bytes)| format!("  {:>9}  {id}", size(*bytes)));
    let list: Vec<String> = std::iter::once(heading).chain(lines).collect();
    if !asks {
        watcher.say(&list.join("\n"));
        watcher.say(&format!("  {:>9}  in all", size(total)));
        return Ok(());
    }
    watcher.clear();
    terminal::message(list.join("\n"));
    match answer(&format!("download {}? [Y/n] ", size(total)))?.as_str() {
        "" | "y" | "yes" => Ok(()),
        _ => {
            let hint = "choose another model or a folder with `--model`; `--yes` does not ask";
            Err(Failure::new("nothing was downloaded").hint(hint).into())
        }
    }
}

/// The free space for files in a folder, which need not exist yet; `None` if the system does not report it.
pub(crate) fn free_space(folder: &Path) -> Option<u64> {
    let existing = folder.ancestors().find(|folder| folder.is_dir())?;
    let disk = fs4::statvfs(existing).ok()?;
    (disk.total_space() > 0).then(|| disk.available_space())
}

fn no_room(order: &Order, total: u64, free: u64, cache: &Path) -> Failure {
    let names: Vec<String> = order.iter().map(|(id, _)| id.to_string()).collect();
    let message = format!(
        "downloading {} takes {}, and {} has {} free",
        names.join(", "),
        size(total),
        cache.display(),
        size(free)
    );
    Failure::new(message).hint("make room, or name another folder with HF_HUB_CACHE")
}

/// The user's answer in lower case; the end of input means no.
fn answer(question: &str) -> anyhow::Result<String> {
    let mut stderr = io::stderr().lock();
    write!(stderr, "{question}").and_then(|()| stderr.flush())?;
    let (sender, receiver) = mpsc::channel();
    // A separate thread, since Ctrl-C does not interrupt reading a line.
    let read = move || {
        let mut line = String::new();
        let read = io::stdin().lock().read_line(&mut line);
        let _ = sender.send(read.map(|bytes| match bytes {
            0 => "no".to_owned(),
            _ => line.trim().to_lowercase(),
        }));
    };
    std::thread::Builder::new()
        .name("answer".to_owned())
        .spawn(read)?;
    loop {
        match receiver.recv_timeout(TICK) {
            Ok(answer) => return Ok(answer?),
            Err(RecvTimeoutError::Timeout) if !signals::stopping() => {}
            Err(_) => return Err(Failure::interrupted("nothing was downloaded").into()),
        }
    }
}
