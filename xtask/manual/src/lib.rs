//! What a program writes of its own command line: man pages and shell completions.
//!
//! Each program has a hidden command `generate` for it, so that the pages in a package are those of the very build that lies beside them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Command, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;

/// Section of the manual: programs for the administrator.
pub const SECTION: &str = "8";

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A man page for the program and one for each of its commands
    Man,
    /// Completions for bash
    Bash,
    /// Completions for zsh
    Zsh,
    /// Completions for fish
    Fish,
}

/// Options of `generate`.
#[derive(Args, Clone, Debug)]
pub struct Generate {
    /// What to write
    #[arg(value_enum)]
    pub kind: Kind,
    /// The directory to write to; completions go to stdout without it
    #[arg(long, value_name = "DIRECTORY", required_if_eq("kind", "man"))]
    pub out: Option<PathBuf>,
}

/// Writes it. `command` is the program's own definition.
///
/// # Errors
/// What the file system says.
pub fn generate(command: Command, options: &Generate) -> io::Result<()> {
    match (options.kind, &options.out) {
        (Kind::Man, out) => man(command, out.as_deref().unwrap_or(Path::new("."))),
        (Kind::Bash, out) => completions(command, Shell::Bash, out.as_deref()),
        (Kind::Zsh, out) => completions(command, Shell::Zsh, out.as_deref()),
        (Kind::Fish, out) => completions(command, Shell::Fish, out.as_deref()),
    }
}

fn completions(mut command: Command, shell: Shell, out: Option<&Path>) -> io::Result<()> {
    let name = command.get_name().to_owned();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, name.clone(), &mut text);
    match out {
        Some(directory) => {
            let file = clap_complete::Generator::file_name(&shell, &name);
            fs::write(directory.join(file), text)
        }
        None => io::stdout().write_all(&text),
    }
}

fn man(command: Command, directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut command = command.disable_help_subcommand(true);
    let version = command.get_version().unwrap_or_default().to_owned();
    // Gives each command its whole name, and the options that hold for all.
    command.build();
    page(&command, &version, directory)
}

/// A command's page, and those of its commands.
fn page(command: &Command, version: &str, directory: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let man = Man::new(command.clone())
        .section(SECTION)
        .title(name.clone())
        .source(format!("Poolskip {version}"))
        .manual("Poolskip")
        .date("");
    man.render(&mut File::create(directory.join(format!("{name}.{SECTION}")))?)?;
    command
        .get_subcommands()
        .filter(|one| !one.is_hide_set())
        .try_for_each(|one| page(one, version, directory))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]
mod tests {
    use super::*;

    fn program() -> Command {
        Command::new("program")
            .version("1.2")
            .about("Does things.")
            .subcommand(Command::new("first").about("The first."))
            .subcommand(Command::new("hidden").hide(true))
            .subcommand(Command::new("more").subcommand(Command::new("inner")))
    }

    #[test]
    fn each_command_that_is_shown_has_a_page_under_its_whole_name() {
        let directory = tempfile::tempdir().unwrap();
        generate(program(), &Generate { kind: Kind::Man, out: Some(directory.path().to_owned()) }).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["program-first.8", "program-more-inner.8", "program-more.8", "program.8"]);
        let page = fs::read_to_string(directory.path().join("program-first.8")).unwrap();
        assert!(page.contains(".TH program-first 8") && page.contains("The first."), "{page}");
        let page = fs::read_to_string(directory.path().join("program.8")).unwrap();
        assert!(!page.contains("hidden"), "{page}");
    }

    #[test]
    fn completions_have_the_names_that_shells_look_for() {
        let directory = tempfile::tempdir().unwrap();
        for kind in [Kind::Bash, Kind::Zsh, Kind::Fish] {
            generate(program(), &Generate { kind, out: Some(directory.path().to_owned()) }).unwrap();
        }
        for name in ["program.bash", "_program", "program.fish"] {
            let text = fs::read_to_string(directory.path().join(name)).unwrap();
            assert!(text.contains("first"), "{name}: {text}");
        }
    }
}
