//! How the program ends.

use std::process::ExitCode;

use difference_inversion::util::error::ErrorClass;

use super::signals;

/// All exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// 0: done.
    Done,
    /// 1: failed, for a reason that the others do not name; for `eval run`, also if a single analogy failed.
    Failed,
    /// 64, `EX_USAGE` of sysexits.h: the command is wrong as it is written, or would replace what is there; nothing was
    /// done.
    Usage,
    /// 65, `EX_DATAERR`: an input is missing or wrong: a picture, a model, a line of a file, the value of a setting.
    Data,
    /// 75, `EX_TEMPFAIL`: the network failed, memory did not suffice, another run writes the same output, or the time is
    /// over. A scheduler can start the same command again.
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
  64   never try again: wrong usage, or it would replace a result; nothing was done
  65   never try again: an input is missing or wrong (a picture, a model, a setting's value)
  75   try again: --minutes are over, no network, too little memory, or another run writes the output
  130  stopped by Ctrl-C (143 by SIGTERM, 129 by closing the terminal); finished results are kept";

impl Exit {
    /// How an error of this class ends the program.
    pub(crate) fn of(class: ErrorClass) -> Self {
        match class {
            ErrorClass::Input => Self::Data,
            ErrorClass::Temporary => Self::Again,
            ErrorClass::Stopped => signals::exit(),
            ErrorClass::Other => Self::Failed,
        }
    }

    /// Whether the same command would end in the same way.
    pub(crate) fn is_final(self) -> bool {
        matches!(self, Self::Usage | Self::Data)
    }

    /// The number.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 64,
            Self::Data => 65,
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
            Exit::Data,
            Exit::Again,
            Exit::Stopped(2),
            Exit::Stopped(15),
            Exit::Stopped(1),
        ];
        for (exit, code) in all.into_iter().zip([0, 1, 64, 65, 75, 130, 143, 129]) {
            assert_eq!(exit.code(), code);
            assert!(ABOUT.contains(&format!("{code} ")), "{code}");
        }
    }
}
