//! `xl migrate` as [`toolstack`](super::toolstack)'s script hands it on: done by `migrate` where that can do it, by the real xl where not.
//!
//! What falls to the real xl does so before anything was begun: other options than `--debug`, or a host where nobody receives. A
//! migration that this program has begun is its own to the end.

use std::ffi::OsString;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use clap::{Args, Parser as _};

use super::configuration::Configuration;
use super::{CommandLine, EXIT_NOT_BEGUN, connection, migrate};

/// How long the other host may take to answer on the port where `receive` listens.
const ANSWER: Duration = Duration::from_secs(3);

/// Options of `as-xl`.
#[derive(Args, Clone, Debug)]
pub struct AsXl {
    /// The real xl.
    pub xl: PathBuf,
    /// What it was called with.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<OsString>,
}

/// What a command line of xl's asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    /// A migration as this program does it.
    Migration { domain: String, host: String, debug: bool },
    /// Something that only the real xl does; the word that says so, where that is worth a line.
    Xl(Option<String>),
}

/// Does it, or becomes the real xl.
pub fn run(options: &AsXl, configuration: &Configuration) -> u8 {
    match read(&options.arguments) {
        Wanted::Migration { domain, host, debug } => match answers(&host) {
            Ok(()) => {
                let mut words = vec!["dom0-migrator", "migrate", &domain, &host];
                words.extend(debug.then_some("--debug"));
                match CommandLine::try_parse_from(words) {
                    Ok(CommandLine { command: super::Command::Migrate(options), .. }) => {
                        return migrate::run(&options, configuration);
                    }
                    Ok(_) => {}
                    Err(error) => eprintln!("poolskip: {error}"),
                }
            }
            Err(why) => eprintln!("poolskip: {why}; a plain `xl migrate` follows"),
        },
        Wanted::Xl(Some(word)) => eprintln!("poolskip: {word} is for xl alone; a plain `xl migrate` follows"),
        Wanted::Xl(None) => {}
    }
    let error = Command::new(&options.xl).args(&options.arguments).exec();
    eprintln!("poolskip: {}: {error}", options.xl.display());
    EXIT_NOT_BEGUN
}

/// Whether somebody listens there.
fn answers(host: &str) -> Result<(), String> {
    let target = connection::with_port(host);
    let failed = |error: std::io::Error| format!("nobody receives at {target} ({error})");
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "no address of that name");
    for address in target.to_socket_addrs().map_err(failed)? {
        match TcpStream::connect_timeout(&address, ANSWER) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

/// Reads a command line as xl does: options of its own, the command, the command's options, domain and host.
fn read(arguments: &[OsString]) -> Wanted {
    let mut words = arguments.iter().map(|word| word.to_str());
    for word in words.by_ref() {
        match word {
            Some("migrate") => break,
            // -v, -f, -N, -t, -T in any number: what is shown, and the lock of old.
            Some(word) if word.len() > 1 && word.starts_with('-') && !word.starts_with("--") => {}
            _ => return Wanted::Xl(None),
        }
    }
    let (mut debug, mut rest) = (false, Vec::new());
    for word in words {
        match word {
            Some("--debug") => debug = true,
            Some("-h" | "--help") => return Wanted::Xl(None),
            Some(word) if word.starts_with('-') => return Wanted::Xl(Some(word.to_owned())),
            Some(word) => rest.push(word.to_owned()),
            None => return Wanted::Xl(None),
        }
    }
    match <[String; 2]>::try_from(rest) {
        Ok([domain, host]) => {
            // As for ssh, which this program does without.
            let host = host.rsplit_once('@').map_or(host.as_str(), |(_, host)| host).to_owned();
            Wanted::Migration { domain, host, debug }
        }
        Err(_) => Wanted::Xl(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(line: &str) -> Wanted {
        read(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn a_migration_that_this_program_can_do_is_understood() {
        let plain = |host: &str, debug| Wanted::Migration { domain: "db1".into(), host: host.into(), debug };
        assert_eq!(wanted("migrate db1 host-b"), plain("host-b", false));
        assert_eq!(wanted("-vvv -t migrate --debug db1 root@10.0.0.2"), plain("10.0.0.2", true));
        assert_eq!(wanted("migrate db1 host-b --debug"), plain("host-b", true));
    }

    #[test]
    fn everything_else_is_the_real_one_s() {
        for line in
            ["", "list", "migrate", "migrate db1", "migrate db1 b c", "migrate --help", "--version migrate"]
        {
            assert_eq!(wanted(line), Wanted::Xl(None), "{line}");
        }
        for (line, word) in
            [("migrate -e db1 b", "-e"), ("migrate -C file db1 b", "-C"), ("migrate -s ssh db1 b", "-s")]
        {
            assert_eq!(wanted(line), Wanted::Xl(Some(word.into())), "{line}");
        }
    }
}
