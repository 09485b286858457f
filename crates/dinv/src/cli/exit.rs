//! How the program ends.

use std::process::ExitCode;

/// All exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// 0: done.
    Done,
    /// 1: failed; for `eval run`, also if a single analogy failed.
    Failed,
    /// 2: wrong usage: invalid command or settings; nothing was done.
    Usage,
    /// 75, `EX_TEMPFAIL` of sysexits.h: a temporary failure, such as a network that cannot be reached, another run that
    /// writes the same output, or a time slot that is over. A scheduler can start the same command again.
    Again,
    /// 128 plus the number of the signal that asked for a stop, as in shells: 130 after Ctrl-C, 143 after
    /// SIGTERM, 129 after the terminal was closed. Finished results are kept.
    Stopped(i32),
}

/// The end of `dinv --help`.
pub(crate) const ABOUT: &str = "Start with: dinv analogy

Exit codes:
  0    done
  1    failed
  2    wrong usage: invalid command or settings; nothing was done
  75   try again later: the network failed, another run writes the same output, or --minutes are over
  130  stopped by Ctrl-C (143 by SIGTERM, 129 by closing the terminal); finished results are kept";

impl Exit {
    /// The number.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Again => 75,
            Self::Stopped(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_tells_every_code() {
        let all = [
            Exit::Done,
            Exit::Failed,
            Exit::Usage,
            Exit::Again,
            Exit::Stopped(2),
            Exit::Stopped(15),
            Exit::Stopped(1),
        ];
        for (exit, code) in all.into_iter().zip([0, 1, 2, 75, 130, 143, 129]) {
            assert_eq!(exit.code(), code);
            assert!(ABOUT.contains(&format!("{code} ")), "{code}");
        }
    }
}
