//! `/etc/poolskip/migrator.toml`: what the command line does not say. `migrator.example.toml` beside the sources shows every key.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::bundle::Compression;
use super::connection::Transport;
use super::pump::Bandwidth;
use super::tls::{self, Identity, TlsError};
use crate::control::CONNECTIONS_MAX;
use crate::handover::record;

/// Where the file lies.
pub const FILE: &str = "/etc/poolskip/migrator.toml";

/// The file's content; a key that is not there has its default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Configuration {
    /// Where the records of migrations are kept.
    pub records: PathBuf,
    /// Where this host's certificates lie.
    pub certificates: PathBuf,
    /// Whether connections are neither encrypted nor authenticated.
    pub plain: bool,
    /// Address and port on which `receive` listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// Bytes per second that a migration may send; `"0"` for no limit.
    pub bandwidth: Rate,
    /// TCP connections over which the stream of a migration goes.
    pub connections: u16,
    /// How the stream is compressed.
    pub compress: Compression,
    /// Seconds that the guest may take to publish its lists.
    pub wait_lists: u64,
    /// Whether the log of dirty pages is looked at during a pass, and pages that are marked again are left for a later one.
    pub peek: bool,
    /// Port on which the helper of a plain `xl migrate` waits for the target's; 0 for any that is free.
    pub side_port: u16,
}

impl Default for Configuration {
    fn default() -> Self {
        Self {
            records: record::DIRECTORY.into(),
            certificates: tls::DIRECTORY.into(),
            plain: false,
            listen: None,
            bandwidth: Rate(0),
            connections: 4,
            compress: Compression::Off,
            wait_lists: 30,
            peek: true,
            side_port: 0,
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not understood.
    #[error("{path}: {source}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: Box<toml::de::Error>,
    },
    /// A number of connections that cannot be.
    #[error("{path}: connections is {found}, 1 to {CONNECTIONS_MAX} are possible")]
    Connections {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u16,
    },
    /// Without certificates, and not told to be plain.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Configuration {
    /// Reads a file, or the usual one if it is there.
    ///
    /// # Errors
    /// [`ConfigurationError`].
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigurationError> {
        let path = file.unwrap_or(Path::new(FILE));
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text),
            Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigurationError::Io { path: path.to_owned(), source }),
        }
    }

    /// Parses the text of the file at `path`.
    ///
    /// # Errors
    /// [`ConfigurationError::Malformed`], [`ConfigurationError::Connections`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigurationError> {
        let read = toml::from_str::<Self>(text).map_err(|source| ConfigurationError::Malformed {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        if (1..=CONNECTIONS_MAX).contains(&read.connections) {
            Ok(read)
        } else {
            Err(ConfigurationError::Connections { path: path.to_owned(), found: read.connections })
        }
    }

    /// How connections are made, with what the command line says on top.
    ///
    /// # Errors
    /// [`ConfigurationError::Tls`].
    pub fn transport(&self, options: &Connecting) -> Result<Transport, ConfigurationError> {
        let plain = options.plain || self.plain;
        let directory = options.certificates.as_ref().unwrap_or(&self.certificates);
        let identity = if plain { None } else { Some(Identity::load(directory)?) };
        Ok(Transport { identity, bandwidth: None })
    }

    /// The limit on what a migration sends.
    pub fn limit(&self, wanted: Option<Rate>) -> Option<Arc<Bandwidth>> {
        let Rate(rate) = wanted.unwrap_or(self.bandwidth);
        (rate > 0).then(|| Arc::new(Bandwidth::new(rate)))
    }
}

/// How to connect: options of several commands.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Connecting {
    /// Neither encrypt nor authenticate: only on a network that no others than the hosts share.
    #[arg(long)]
    pub plain: bool,
    /// This host's certificates [default: /etc/poolskip/certificates].
    #[arg(long, value_name = "DIRECTORY")]
    pub certificates: Option<PathBuf>,
}

/// Bytes per second, written as a number or with k, M or G (thousands) behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rate(pub u64);

impl FromStr for Rate {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (number, factor) = match text.trim() {
            text if text.ends_with('k') => (text.trim_end_matches('k'), 1_000),
            text if text.ends_with('M') => (text.trim_end_matches('M'), 1_000_000),
            text if text.ends_with('G') => (text.trim_end_matches('G'), 1_000_000_000),
            text => (text, 1_u64),
        };
        let number: u64 = number.parse().map_err(|_| format!("{text:?} is no rate, as in 100M"))?;
        number.checked_mul(factor).map(Self).ok_or_else(|| format!("{text:?} is too much"))
    }
}

impl TryFrom<String> for Rate {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Rate> for String {
    fn from(rate: Rate) -> Self {
        rate.to_string()
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../migrator.example.toml");

    #[test]
    fn the_example_has_every_key_with_a_comment_and_its_default() {
        assert_eq!(toml::from_str::<Configuration>(EXAMPLE).unwrap(), Configuration::default());
        // Those without a default count as said.
        let text = EXAMPLE.replace("\n#= ", "\n");
        let example: Configuration = toml::from_str(&text).unwrap();
        let listen = Some("10.0.0.2:8002".parse().unwrap());
        assert_eq!(example, Configuration { listen, ..Configuration::default() });
        let keys = toml::Table::try_from(&example).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for key in keys.keys() {
            let at = lines.iter().position(|line| line.starts_with(&format!("{key} = "))).unwrap();
            assert!(lines[at - 1].starts_with("# "), "{key} has no comment");
        }
    }

    #[test]
    fn a_key_that_is_not_known_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("migrator.toml");
        std::fs::write(&path, "bandwith = \"1G\"\n").unwrap();
        let error = Configuration::load(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("bandwith"), "{error}");
        std::fs::write(&path, "connections = 0\n").unwrap();
        let error = Configuration::load(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("1 to 16"), "{error}");
        assert!(Configuration::load(Some(&directory.path().join("none"))).is_err());
    }

    #[test]
    fn rates_are_read() {
        assert_eq!(
            ("100M".parse(), "5k".parse(), "7".parse()),
            (Ok(Rate(100_000_000)), Ok(Rate(5_000)), Ok(Rate(7)))
        );
        for bad in ["", "M", "1x", "-1", "99999999999G"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }
}
