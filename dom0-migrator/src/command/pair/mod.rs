//! `pair`: two hosts that know each other, in one command.
//!
//! Trust begins with ssh. The operator's ssh knows the other host's key (or shows its fingerprint and asks), and the other host knows the
//! operator's; over that connection travel a request for a certificate, one way, and the certificate and the authority that signed it, the
//! other. Each host's key is made where it stays. Who must do without ssh between the hosts uses `certificates make`, and brings the
//! directories there himself.
//!
//! ```text
//! pair                                       over ssh
//!   │ ── certificates request ─────────────────►│  a key of its own, aside
//!   │ ◄──────────────── names, request ─────────│
//!   │ ── certificates accept: both certificates►│  the key is its own? signed by that authority? then all three at once
//! ```

mod other;

pub use other::{Accept, Grant, accept, grant, request};

use std::io::Write as _;
use std::net::{IpAddr, ToSocketAddrs as _, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::certificates::{self, CertificateError, Signer};
use super::configuration::Configuration;
use super::doctor::fingerprint;
use super::tls::{AUTHORITY, CERTIFICATE, Identity};
use super::{DEFAULT_PORT, EXIT_FAILED, EXIT_MIGRATED, connection};

/// Where the authority lies on the host that pairs others.
pub const AUTHORITY_DIRECTORY: &str = "/etc/poolskip/authority";

/// Options of `pair`.
#[derive(Args, Clone, Debug)]
pub struct Pair {
    /// The other host, by the name or address that migrations will connect to; [USER@]HOST, as for ssh.
    #[arg(value_name = "HOST")]
    pub host: String,
    /// Names and addresses by which others connect to this host [default: its name, and its address on the way to HOST].
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
    /// Make new certificates for both, although they have some, of whatever authority.
    #[arg(long)]
    pub renew: bool,
    /// The authority, which is made if there is none.
    #[arg(long, value_name = "DIRECTORY", default_value = AUTHORITY_DIRECTORY)]
    pub authority: PathBuf,
    /// The command that reaches the other host, with options of its own.
    #[arg(long, value_name = "COMMAND", default_value = "ssh")]
    pub ssh: String,
}

/// What the other host says when it is asked to request a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Requested {
    /// Its own names.
    names: Vec<String>,
    /// The request, as PEM.
    request: String,
    /// Fingerprint of the authority that it knows already.
    authority: Option<String>,
}

/// What it gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Granted {
    /// Its certificate, as PEM.
    certificate: String,
    /// The authority's.
    authority: String,
}

/// Why hosts are not paired.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// A certificate.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// A certificate could not be made or read.
    #[error("{what}: {problem}")]
    Making {
        /// Which.
        what: String,
        /// What is wrong.
        problem: String,
    },
    /// ssh did not do what it was to do.
    #[error("{command}: {problem}")]
    Ssh {
        /// What was run.
        command: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// This host was given its certificate by an authority that is somewhere else.
    #[error(
        "this host has certificates already, and the key of the authority that signed them is not in {0}: run `pair` on the host where it is, or name its directory with --authority, or begin anew with --renew (then every host must be paired again)"
    )]
    NoAuthority(PathBuf),
    /// The other host belongs to another authority.
    #[error("{host} has certificates of another authority already ({fingerprint}); --renew replaces them")]
    Other {
        /// The host.
        host: String,
        /// Its authority's fingerprint.
        fingerprint: String,
    },
}

/// Pairs, and says what it did.
pub fn run(options: &Pair, configuration: &Configuration) -> u8 {
    match pair(options, &configuration.certificates) {
        Ok(lines) => {
            for line in lines {
                println!("{line}");
            }
            verify(options, &configuration.certificates);
            EXIT_MIGRATED
        }
        Err(error) => {
            eprintln!("dom0-migrator: {error}");
            EXIT_FAILED
        }
    }
}

fn pair(options: &Pair, own: &Path) -> Result<Vec<String>, PairError> {
    let host = host_of(&options.host);
    certificates::check_name(host)?;
    options.names.iter().try_for_each(|name| certificates::check_name(name))?;
    let has_own = own.join(CERTIFICATE).exists();
    if has_own && !Signer::is_there(&options.authority) && !options.renew {
        return Err(PairError::NoAuthority(options.authority.clone()));
    }
    // The other host first: should it not be reachable, nothing was changed here.
    let requested: Requested = ask(options, &["certificates", "request"], None)?;
    let authority = Signer::open(&options.authority)?;
    let print = fingerprint(&options.authority.join(AUTHORITY)).map_err(making("the authority"))?;
    let mut lines = vec![format!("authority  {print}")];
    match requested.authority {
        Some(known) if known == print && !options.renew => {
            let _: String = ask(options, &["certificates", "accept"], None)?;
            lines.push(format!("{host} has a certificate of it already; --renew makes a new one"));
        }
        Some(known) if known != print && !options.renew => {
            return Err(PairError::Other { host: host.to_owned(), fingerprint: known });
        }
        _ => {
            let mut names = vec![host.to_owned()];
            names.extend(addresses(host));
            names.extend(requested.names.into_iter().filter(|name| certificates::check_name(name).is_ok()));
            names.dedup();
            let certificate = authority
                .sign(&requested.request, &names)
                .map_err(|error| making(host)(error.to_string()))?;
            let granted = Granted { certificate, authority: authority.certificate.clone() };
            let replace: &[&str] = if options.renew { &["--replace"] } else { &[] };
            let _: String = ask(options, &[&["certificates", "accept"], replace].concat(), Some(&granted))?;
            lines.push(format!("{host} has a certificate now, for {}", names.join(", ")));
        }
    }
    let signed_here = has_own
        && fingerprint(&own.join(AUTHORITY)).is_ok_and(|known| known == print)
        && Identity::load(own).is_ok();
    if has_own && !signed_here && !options.renew {
        return Err(PairError::NoAuthority(options.authority.clone()));
    }
    if signed_here && !options.renew {
        lines.push("this host has a certificate of it already; --renew makes a new one".to_owned());
    } else {
        let names = if options.names.is_empty() { own_names(host) } else { options.names.clone() };
        let (key, request) =
            certificates::request(&names).map_err(|error| making("this host")(error.to_string()))?;
        let certificate =
            authority.sign(&request, &names).map_err(|error| making("this host")(error.to_string()))?;
        other::install(own, &key, &certificate, &authority.certificate)?;
        lines.push(format!("this host has a certificate now, for {}", names.join(", ")));
    }
    Ok(lines)
}

fn making(what: &str) -> impl FnOnce(String) -> PairError {
    let what = format!("the certificate of {what}");
    move |problem| PairError::Making { what, problem }
}

/// The host of `USER@HOST`.
fn host_of(destination: &str) -> &str {
    destination.rsplit_once('@').map_or(destination, |(_, host)| host)
}

/// Addresses of a name; none of an address.
fn addresses(host: &str) -> Vec<String> {
    if host.parse::<IpAddr>().is_ok() {
        return Vec::new();
    }
    let found = (host, DEFAULT_PORT).to_socket_addrs().map(Iterator::collect::<Vec<_>>).unwrap_or_default();
    found.iter().map(|address| address.ip()).filter(|ip| !ip.is_loopback()).map(|ip| ip.to_string()).collect()
}

/// By what others may know this host: its name, and its address on the way to the other one.
fn own_names(other: &str) -> Vec<String> {
    let mut names = hostname();
    let any = if other.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
    // Nothing is sent: the kernel only chooses the way.
    let way = UdpSocket::bind(any).and_then(|socket| {
        socket.connect((other, DEFAULT_PORT))?;
        socket.local_addr()
    });
    names.extend(way.ok().map(|address| address.ip().to_string()));
    names
}

/// This host's name, where it is one that a certificate can have.
fn hostname() -> Vec<String> {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.filter(|name| certificates::check_name(name).is_ok()).into_iter().collect()
}

/// Runs this program there.
fn ask<T: serde::de::DeserializeOwned>(
    options: &Pair,
    arguments: &[&str],
    input: Option<&Granted>,
) -> Result<T, PairError> {
    let mut words = options.ssh.split_whitespace();
    let program = words.next().unwrap_or("ssh");
    let destination =
        if options.host.contains('@') { options.host.clone() } else { format!("root@{}", options.host) };
    // Where a shell that is no login shell would not look.
    let line = format!("PATH=$PATH:/usr/local/sbin:/usr/sbin exec dom0-migrator {}", arguments.join(" "));
    let command = format!("{} {destination} dom0-migrator {}", options.ssh, arguments.join(" "));
    let failed = |problem: String| PairError::Ssh { command: command.clone(), problem };
    let mut child = Command::new(program)
        .args(words)
        .arg(&destination)
        .arg(line)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("{program} cannot be started: {error}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // `null` where nothing is granted.
        let text = serde_json::to_vec(&input).map_err(|error| failed(error.to_string()))?;
        // A command that has ended says so by its exit code.
        let _ = stdin.write_all(&text);
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    match output.status.code() {
        Some(0) => serde_json::from_slice(&output.stdout)
            .map_err(|error| failed(format!("an answer that cannot be understood ({error}): is it of the same release?"))),
        Some(255) => Err(failed(
            "ssh could not connect, or was not let in (its own words are above); nothing was changed on either host".into(),
        )),
        Some(126 | 127) => Err(failed("there is no dom0-migrator there: install poolskip-dom0 on that host too".into())),
        _ => Err(failed(format!("ended with {}; its own words are above", output.status))),
    }
}

/// Tries the connection, where somebody receives already.
fn verify(options: &Pair, own: &Path) {
    let host = host_of(&options.host);
    let target = connection::with_port(host);
    let connected =
        target.to_socket_addrs().ok().and_then(|mut addresses| addresses.next()).and_then(|address| {
            std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_secs(3)).ok()
        });
    let Some(tcp) = connected else {
        println!("nobody receives at {target} yet: there, `systemctl enable --now poolskip-receive.socket`");
        return;
    };
    match Identity::load(own)
        .map_err(|error| error.to_string())
        .and_then(|identity| identity.connect(&tcp, host).map(drop).map_err(|error| error.to_string()))
    {
        Ok(()) => println!("{target} receives, and both know each other"),
        Err(error) => println!(
            "{target} receives, but: {error}; if it ran before this: there, `systemctl restart poolskip-receive.service` when no \
             migration runs"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_one_connects_to() {
        assert_eq!(
            (host_of("root@host-b"), host_of("10.0.0.2"), host_of("a@b@c")),
            ("host-b", "10.0.0.2", "c")
        );
        assert!(addresses("10.0.0.2").is_empty());
        let own = own_names("127.0.0.1");
        assert_eq!(own.last().map(String::as_str), Some("127.0.0.1"));
    }
}
