//! The configuration file. `guest-probe/guest-probe.toml` in the tree is it with every key, at its default, explained.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::probes::RING_BYTES;
use crate::process::Choice;
use crate::session::Options;
use crate::status::SOCKET_PATH;
use crate::storage_map::DiskRule;

/// Where it lies.
pub const CONFIG_PATH: &str = "/etc/poolskip/guest-probe.toml";
/// No configuration is longer, in bytes.
const LONGEST: u64 = 1 << 20;
/// The ring buffer in KiB: from room for 128 events to 64 MiB.
const RING_KIB: std::ops::RangeInclusive<u32> = 4..=65_536;

/// When probes are in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// From a request of dom0 on until the migration has ended: before and after, mysqld runs as if there were no probe.
    #[default]
    OnDemand,
    /// All the time.
    Resident,
}

/// What `guest-probe run` does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// When probes are in place.
    pub mode: Mode,
    /// The only mysqld to probe; every one that runs without it.
    pub pid: Option<i32>,
    /// The kernel module's device.
    pub device: PathBuf,
    /// Where `status` and `watch` ask.
    pub socket: PathBuf,
    /// On demand: probes are taken out when dom0 has asked nothing for so many seconds. After a migration that went well nobody is left
    /// here to say so.
    pub detach_after_seconds: u64,
    /// Whether cached pages of files are listed, too.
    pub page_cache: bool,
    /// KiB in each server's ring buffer, a power of two.
    pub ring_kib: u32,
    /// Let the kernel count the runs of the eBPF programs and their time; some 20 ns a run.
    pub statistics: bool,
    /// For Prometheus.
    pub metrics: MetricsConfig,
}

/// Where metrics can be had; nowhere by default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MetricsConfig {
    /// Address to answer `GET /metrics` at; of the loopback only, since nothing is asked of who reads.
    pub listen: Option<SocketAddr>,
    /// File for node_exporter's textfile collector, replaced as a whole.
    pub textfile: Option<PathBuf>,
    /// Seconds between two of them.
    pub textfile_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::OnDemand,
            pid: None,
            device: enlightenment::device::DEVICE_PATH.into(),
            socket: SOCKET_PATH.into(),
            detach_after_seconds: 600,
            page_cache: true,
            ring_kib: RING_BYTES / 1024,
            statistics: false,
            metrics: MetricsConfig::default(),
        }
    }
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { listen: None, textfile: None, textfile_seconds: 15 }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not TOML, or has a key that does not exist or a value of another kind.
    #[error("the configuration {path} cannot be understood: {source}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("the configuration has {key} = {value}: {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would do.
        why: &'static str,
    },
}

impl Config {
    /// Reads the file that is named, which must be there, or else the one at [`CONFIG_PATH`], if it is.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(named: Option<&Path>) -> Result<Self, ConfigError> {
        let path = named.unwrap_or(Path::new(CONFIG_PATH));
        let failed = |source| ConfigError::Read { path: path.to_path_buf(), source };
        match fs::metadata(path) {
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(failed(error)),
            Ok(meta) if meta.len() > LONGEST => return Err(failed(io::ErrorKind::FileTooLarge.into())),
            Ok(_) => {}
        }
        Self::parse(path, &fs::read_to_string(path).map_err(failed)?)
    }

    /// Parses the text of the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|source| ConfigError::Syntax { path: path.to_path_buf(), source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key, value: String, why| Err(ConfigError::Value { key, value, why });
        if !self.ring_kib.is_power_of_two() || !RING_KIB.contains(&self.ring_kib) {
            return wrong("ring-kib", self.ring_kib.to_string(), "a power of two from 4 to 65536 will do");
        }
        if let Some(address) = self.metrics.listen.filter(|address| !address.ip().is_loopback()) {
            let why = "only an address of the loopback will do, such as 127.0.0.1:9464";
            return wrong("metrics.listen", address.to_string(), why);
        }
        if self.metrics.textfile_seconds == 0 {
            return wrong("metrics.textfile-seconds", "0".to_owned(), "1 or more will do");
        }
        Ok(())
    }

    /// Which servers are probed.
    pub fn choice(&self) -> Choice {
        self.pid.map_or(Choice::All, Choice::One)
    }

    /// Options of each session: what is published names disks as Xen does.
    pub fn options(&self) -> Options {
        Options {
            pid: self.pid,
            ring_bytes: self.ring_kib * 1024,
            rule: DiskRule::Xen,
            page_cache: self.page_cache,
            wrong_hints: None,
        }
    }

    /// On demand: how long probes stay in place after the last request.
    pub fn detach_after(&self) -> Duration {
        Duration::from_secs(self.detach_after_seconds)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXAMPLE: &str = include_str!("../guest-probe.toml");

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("x.toml"), text)
    }

    /// The example with the keys that have no default, too.
    fn example_with_all_keys() -> String {
        EXAMPLE.lines().map(|line| line.strip_prefix("#= ").unwrap_or(line).to_owned() + "\n").collect()
    }

    #[test]
    fn the_example_is_the_default() {
        assert_eq!(parse(EXAMPLE).unwrap(), Config::default());
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn the_example_has_every_key_with_words_before_it() {
        let text = example_with_all_keys();
        let config = parse(&text).unwrap();
        let all = toml::Value::try_from(&config).unwrap();
        let metrics = all["metrics"].as_table().unwrap();
        let keys: Vec<&String> = all.as_table().unwrap().keys().chain(metrics.keys()).collect();
        // None is left out: serde writes no key for what is not there.
        assert!(config.pid.is_some() && config.metrics.listen.is_some() && config.metrics.textfile.is_some());
        assert_eq!(keys.len(), 12);
        let lines: Vec<&str> = text.lines().collect();
        for key in keys.into_iter().filter(|key| *key != "metrics") {
            let at = lines.iter().position(|line| line.starts_with(&format!("{key} = ")));
            let at = at.unwrap_or_else(|| panic!("{key} is not in the example"));
            assert!(lines[at - 1].starts_with("# "), "{key} is not explained");
        }
    }

    #[test]
    fn what_cannot_be_is_said() {
        for (text, words) in [
            ("mod = 1", "unknown field `mod`"),
            ("mode = \"always\"", "on-demand"),
            ("ring-kib = 3", "power of two"),
            ("ring-kib = 131072", "power of two"),
            ("[metrics]\nlisten = \"0.0.0.0:9464\"", "loopback"),
            ("[metrics]\ntextfile-seconds = 0", "1 or more"),
            ("detach-after-seconds = -1", "detach-after-seconds"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let error = Config::load(Some(Path::new("/nonexistent/x.toml"))).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in any::<String>()) {
            let _ = parse(&text);
        }
    }
}
