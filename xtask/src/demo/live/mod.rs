//! A migration that runs, on a terminal: both hosts, passes, classes of pages, the network, the database; drawn anew in its place about twice
//! a second, and left there when it is over. Where there is no terminal, the migrator's own plain lines.

mod state;
mod view;

use std::fs::File;
use std::io::{IsTerminal as _, Write};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use terminal_size::{Height, Width, terminal_size_of};

use crate::lab::{Host, Lab};
use crate::migration::{self, Onlooker, Options, Plain, Report};
use state::State;

/// How often the client in the guest is asked how far it is.
const ASK: Duration = Duration::from_secs(2);

/// Lets the terminal draw a picture at the pace at which it was recorded, but not slower than this.
const REPLAY_STEP: Duration = Duration::from_millis(120);

/// How migrations are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// As lines.
    Lines,
    /// As a picture on the terminal that standard error is.
    Picture,
}

impl Show {
    /// A picture where there is a terminal that has room for one.
    pub fn auto() -> Self {
        if Screen::of_stderr().is_some() { Self::Picture } else { Self::Lines }
    }

    /// Migrates the guest, and shows it.
    ///
    /// # Errors
    /// Those of [`migration::migrate`].
    pub fn migrate(self, lab: &Lab, from: Host, options: Options, client_writes: bool) -> Result<Report> {
        let screen = match self {
            Self::Lines => None,
            Self::Picture => Screen::of_stderr(),
        };
        let Some(screen) = screen else {
            return migration::migrate_watched(lab, from, options, &mut Plain);
        };
        let title = match options {
            Options { stock: true, .. } => "with the stock helper",
            Options { verify: true, .. } => "with Poolskip, all memory compared",
            Options { .. } => "with Poolskip",
        };
        let (committed, over) = (AtomicU64::new(0), AtomicBool::new(false));
        let guest = lab.guest();
        std::thread::scope(|scope| {
            if client_writes {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        // A guest that moves does not answer; the next time it does.
                        let asked = guest.run("wc -l </run/writer.acknowledged", ASK);
                        if let Some(total) = asked.ok().and_then(|output| output.stdout.trim().parse().ok()) {
                            committed.store(total, Ordering::Relaxed);
                        }
                        std::thread::sleep(ASK);
                    }
                });
            }
            let state = State::new(title, [from.name(), from.other().name()]);
            let mut picture = Picture { screen, state, committed: client_writes.then_some(&committed) };
            let report = migration::migrate_watched(lab, from, options, &mut picture);
            over.store(true, Ordering::Relaxed);
            report
        })
    }
}

/// Shows a migration that was recorded: lines of `dom0-migrator migrate --progress json`.
///
/// # Errors
/// When the file cannot be read, or nobody sees the picture.
pub fn replay(recorded: &Path) -> Result<()> {
    let text =
        std::fs::read_to_string(recorded).with_context(|| format!("cannot read {}", recorded.display()))?;
    let mut state = State::new("recorded", [Host::Source.name(), Host::Target.name()]);
    let Some(screen) = Screen::of_stderr() else {
        for line in text.lines() {
            state.line(line);
            eprintln!("{}", state.words());
        }
        return Ok(());
    };
    let mut picture = Picture { screen, state, committed: None };
    for line in text.lines() {
        picture.line(line);
        picture.tick();
        std::thread::sleep(REPLAY_STEP);
    }
    Ok(())
}

/// A picture that follows a migration.
struct Picture<'a> {
    screen: Screen<File>,
    state: State,
    committed: Option<&'a AtomicU64>,
}

impl Onlooker for Picture<'_> {
    fn wants_events(&self) -> bool {
        true
    }

    fn line(&mut self, line: &str) {
        self.state.line(line);
    }

    fn tick(&mut self) {
        if let Some(committed) = self.committed {
            self.state.committed(committed.load(Ordering::Relaxed));
        }
        // A terminal that has gone away takes nothing from the migration.
        let _ = self.screen.show(&self.state);
    }
}

/// A terminal, and the picture on it.
struct Screen<W> {
    out: W,
    width: u16,
    colours: bool,
    drawn: bool,
}

impl Screen<File> {
    /// Standard error, if it is a terminal with enough columns and lines.
    fn of_stderr() -> Option<Self> {
        let stderr = std::io::stderr();
        if !stderr.is_terminal() {
            return None;
        }
        let (Width(columns), Height(lines)) = terminal_size_of(&stderr)?;
        // One line below for the cursor, one column beside for terminals that go on in the next line too early.
        if columns <= *view::WIDTHS.start() || lines <= view::HEIGHT {
            return None;
        }
        let out = File::from(stderr.as_fd().try_clone_to_owned().ok()?);
        let width = (columns - 1).min(*view::WIDTHS.end());
        Some(Self { out, width, colours: std::env::var_os("NO_COLOR").is_none(), drawn: false })
    }
}

impl<W: Write> Screen<W> {
    /// Draws in the place of what was drawn before.
    fn show(&mut self, state: &State) -> std::io::Result<()> {
        let mut words = String::new();
        if self.drawn {
            words += &format!("\x1b[{}A", view::HEIGHT);
        }
        for line in view::lines(&view::draw(state, self.width), self.colours) {
            // Each line is cleared first: what somebody else has written there does not stay.
            words += &format!("\r\x1b[2K{line}\n");
        }
        self.drawn = true;
        // At once: a picture that is half drawn flickers.
        self.out.write_all(words.as_bytes())?;
        self.out.flush()
    }
}
