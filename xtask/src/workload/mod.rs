//! What the database in the guest is busy with while it is measured.

mod timeline;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

pub use timeline::{Second, mean_between, parse};

/// Where the generator lies in the guest.
pub const TPCC: &str = "/usr/local/bin/tpcc";

/// Where a load's lines go.
const LOG: &str = "/run/workload.log";

/// Clients of every load. The guest has one processor.
const THREADS: u32 = 2;

/// Longer than any measurement: a load is ended, it does not end.
const FOREVER: u32 = 86_400;

/// How a client in the guest reaches the server.
const SOCKET: &str = "/run/mysqld/mysqld.sock";

/// The research's four workloads, and one whose data does not fit into the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// A warm pool, and nobody asks for anything
    Idle,
    /// sysbench's oltp_read_only over all tables
    Ro,
    /// sysbench's oltp_read_write over all tables
    Rw,
    /// TPC-C, keying rules off
    Tpcc,
    /// oltp_read_write with a pool of half the data
    Spill,
}

/// What a guest can do for a load; a fake one in tests.
pub trait Guest {
    /// Runs a shell command to its end; its standard output. An exit code other than 0 is an error.
    ///
    /// # Errors
    /// When it fails, or the guest does not answer.
    fn shell(&self, command: &str) -> Result<String>;
}

impl Workload {
    /// Its name in figures and files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Ro => "ro",
            Self::Rw => "rw",
            Self::Tpcc => "tpcc",
            Self::Spill => "spill",
        }
    }

    /// Makes the guest ready for it, once: the pool is warm with sysbench's tables before.
    ///
    /// # Errors
    /// When the guest or its server refuses.
    pub fn prepare(self, guest: &impl Guest, settings: &Settings) -> Result<()> {
        match self {
            Self::Idle | Self::Ro | Self::Rw => Ok(()),
            Self::Tpcc => guest
                .shell(&format!(
                    "{TPCC} load --warehouses {} --scale {} && sync",
                    settings.warehouses, settings.tpcc_percent
                ))
                .map(drop),
            Self::Spill => {
                let half = settings.pool_bytes / 2;
                // The server shrinks its pool in the background, and says when it is done.
                let mysql = format!("mysql -uroot -S {SOCKET} -sN -e");
                let is = "SELECT @@innodb_buffer_pool_size";
                let status = "SHOW STATUS LIKE \"Innodb_buffer_pool_resize_status_code\"";
                guest
                    .shell(&format!(
                        "{mysql} 'SET GLOBAL innodb_buffer_pool_size = {half}'; for i in $(seq 300); do \
                         [ \"$({mysql} '{is}')\" = {half} ] && {mysql} '{status}' | grep -qw 0 && exit 0; sleep 1; done; \
                         echo 'the pool does not shrink to half' >&2; exit 1"
                    ))
                    .map(drop)
            }
        }
    }

    /// Starts it in the background. Nothing is to be ended for [`Self::Idle`].
    ///
    /// # Errors
    /// When the guest refuses.
    pub fn start(self, guest: &impl Guest, settings: &Settings) -> Result<()> {
        let Some(command) = self.command(settings) else { return Ok(()) };
        // A line of sysbench's has no time that outlasts a suspension: the shell puts the wall clock before each.
        guest
            .shell(&format!(
                "rm -f {LOG}; ( set -m; ( {command} ) </dev/null 2>&1 | while IFS= read -r line; do \
                 echo \"$EPOCHREALTIME $line\"; done >{LOG} & ) >/dev/null 2>&1; \
                 for i in $(seq 240); do grep -qE '{BEGUN}' {LOG} 2>/dev/null && exit 0; sleep 0.5; done; \
                 echo 'the load does not begin' >&2; tail -n 20 {LOG} >&2; exit 1"
            ))
            .map(drop)
    }

    /// Ends it; what was done in each second.
    ///
    /// # Errors
    /// When it has ended by itself or says nothing: then what was measured was no load. When TPC-C's tables are not consistent.
    pub fn finish(self, guest: &impl Guest, settings: &Settings) -> Result<Vec<Second>> {
        let Some(command) = self.command(settings) else { return Ok(Vec::new()) };
        let program = command.split(' ').next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
        let log = guest.shell(&format!(
            "pid=$(pgrep -x {program}) || {{ echo 'the load ended by itself:' >&2; tail -n 5 {LOG} >&2; exit 1; }}; \
             kill -TERM $pid; for i in $(seq 600); do kill -0 $pid 2>/dev/null || {{ cat {LOG}; exit 0; }}; sleep 0.2; done; \
             echo 'the load does not end' >&2; exit 1"
        ))?;
        let seconds = parse(&log).with_context(|| format!("the time line of {}", self.name()))?;
        ensure!(!seconds.is_empty(), "{} left no time line: {log:?}", self.name());
        if self == Self::Tpcc {
            // Its exit code is 1 when a condition does not hold.
            guest.shell(&format!("{TPCC} check")).context("TPC-C's consistency conditions")?;
        }
        Ok(seconds)
    }

    fn command(self, settings: &Settings) -> Option<String> {
        let sysbench = |script: &str| {
            format!(
                "sysbench {script} --db-driver=mysql --mysql-socket={SOCKET} --mysql-user=root --mysql-db=sbtest --tables={} \
                 --table-size={} --rand-type=uniform --threads={THREADS} --time={FOREVER} --report-interval=1 run",
                settings.tables, settings.rows
            )
        };
        match self {
            Self::Idle => None,
            Self::Ro => Some(sysbench("oltp_read_only")),
            Self::Rw | Self::Spill => Some(sysbench("oltp_read_write")),
            Self::Tpcc => Some(format!("{TPCC} run --seconds {FOREVER} --threads {THREADS}")),
        }
    }
}

/// What a log has as soon as transactions are committed.
const BEGUN: &str = r#"tps: |"committed":"#;

/// Sizes that the loads depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// W of TPC-C.
    pub warehouses: u32,
    /// Of the standard's cardinalities: 100 is the standard.
    pub tpcc_percent: u32,
    /// `innodb_buffer_pool_size`.
    pub pool_bytes: u64,
    /// sysbench's tables.
    pub tables: u32,
    /// Rows in each.
    pub rows: u32,
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use anyhow::bail;

    use super::*;

    struct Fake {
        asked: RefCell<Vec<String>>,
        log: &'static str,
        inconsistent: bool,
    }

    impl Guest for Fake {
        fn shell(&self, command: &str) -> Result<String> {
            self.asked.borrow_mut().push(command.to_owned());
            if self.inconsistent && command.ends_with("tpcc check") {
                bail!("ended with 1");
            }
            Ok(if command.contains("kill -TERM") { self.log.to_owned() } else { String::new() })
        }
    }

    fn guest(log: &'static str) -> Fake {
        Fake { asked: RefCell::default(), log, inconsistent: false }
    }

    fn settings() -> Settings {
        Settings { warehouses: 1, tpcc_percent: 10, pool_bytes: 256 << 20, tables: 4, rows: 240_000 }
    }

    const TPCC_LINE: &str =
        r#"5.5 {"monotonic":1.0,"wall":5.0,"seconds":1.0,"committed":7,"new_order":3,"summary":false}"#;

    #[test]
    fn idle_asks_nothing_of_the_guest() {
        let fake = guest("");
        Workload::Idle.prepare(&fake, &settings()).unwrap();
        Workload::Idle.start(&fake, &settings()).unwrap();
        assert!(Workload::Idle.finish(&fake, &settings()).unwrap().is_empty());
        assert!(fake.asked.borrow().is_empty());
    }

    #[test]
    fn tpcc_is_checked_after_each_run() {
        let fake = guest(TPCC_LINE);
        assert_eq!(Workload::Tpcc.finish(&fake, &settings()).unwrap().len(), 1);
        assert!(fake.asked.borrow().last().unwrap().ends_with("tpcc check"));
        let broken = Fake { inconsistent: true, ..guest(TPCC_LINE) };
        assert!(Workload::Tpcc.finish(&broken, &settings()).is_err());
    }

    #[test]
    fn a_load_that_did_nothing_is_an_error() {
        assert!(Workload::Rw.finish(&guest("1.0 Initializing worker threads...\n"), &settings()).is_err());
    }

    #[test]
    fn spill_halves_the_pool() {
        let fake = guest("");
        Workload::Spill.prepare(&fake, &settings()).unwrap();
        assert!(fake.asked.borrow()[0].contains("innodb_buffer_pool_size = 134217728"));
    }
}
