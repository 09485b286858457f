//! `dinv completions` and `dinv man`: what a shell and `man` need to know of the command line.

use std::path::PathBuf;

use clap::{Arg, Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

use super::output::Outputs;
use super::terminal::{self, Failure};

/// Print the completions of a shell
///
/// Evaluate them when the shell starts, or write them to a file that it reads.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv completions bash > ~/.local/share/bash-completion/completions/dinv
  dinv completions zsh > ~/.zfunc/_dinv
  dinv completions fish > ~/.config/fish/completions/dinv.fish")]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Print a manual page, or write all of them
///
/// Without a command, it is the page of the program. In a folder, dinv-learn.1 is the page of `dinv learn`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv man learn | man -l -
  dinv man --output ~/.local/share/man/man1")]
pub(crate) struct ManArgs {
    /// The command whose page is printed, such as learn or eval run
    #[arg(value_name = "COMMAND", conflicts_with_all = ["output", "overwrite"])]
    command: Vec<String>,
    /// Write the pages of all commands to a folder instead
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Replace pages of an earlier version in that folder
    #[arg(long, requires = "output")]
    overwrite: bool,
}

/// Prints the completions.
pub(crate) fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::command(), "dinv", &mut script);
    terminal::line(String::from_utf8(script)?.trim_end())
}

/// Prints a page, or writes all of them.
pub(crate) fn man(args: &ManArgs) -> anyhow::Result<()> {
    let mut program = super::command().disable_help_subcommand(true);
    program.build(); // names the subcommands in full
    let Some(folder) = &args.output else {
        let mut command = &program;
        for name in &args.command {
            let found = command.find_subcommand(name);
            command = found.ok_or_else(|| {
                let failure = Failure::usage(format!(
                    "there is no command `dinv {}`",
                    args.command.join(" ")
                ));
                failure.hint("`dinv --help` lists the commands")
            })?;
        }
        return terminal::line(page(command)?.trim_end());
    };
    let mut pages = Vec::new();
    all(&program, &mut pages)?;
    let names = pages.iter().map(|(name, _)| name);
    let output = Outputs::folder(folder, names, args.overwrite, &[])?;
    output.check()?;
    let written = output.publish(None, |place| {
        for (name, text) in &pages {
            let path = place(name);
            std::fs::write(&path, text).map_err(difference_inversion::Error::io(path))?;
        }
        Ok(())
    })?;
    written
        .iter()
        .try_for_each(|path| terminal::line(path.display()))
}

/// Adds the pages of a command and of those below it, each with the name of its file.
fn all(command: &Command, pages: &mut Vec<(String, String)>) -> anyhow::Result<()> {
    pages.push((Man::new(command.clone()).get_filename(), page(command)?));
    let below = command
        .get_subcommands()
        .filter(|below| !below.is_hide_set());
    below.into_iter().try_for_each(|below| all(below, pages))
}

/// The manual page of a command. It describes all options, also those that short help leaves out.
fn page(command: &Command) -> anyhow::Result<String> {
    let mut page = Vec::new();
    let described = |arg: Arg| arg.hide_short_help(false);
    Man::new(command.clone().mut_args(described)).render(&mut page)?;
    Ok(String::from_utf8(page)?)
}
