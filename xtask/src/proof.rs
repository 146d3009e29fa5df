//! Proof that a guest is whole: the server never ended, every table is sound, every row is there.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use crate::deployment::guest;
use crate::lab::Lab;

/// How a client in the guest reaches the server.
const MYSQL: &str = "mysql -uroot -S /run/mysqld/mysqld.sock --skip-column-names --batch";

/// A process that is the same as long as both numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Server {
    /// PID of mysqld in the guest.
    pub pid: u32,
    /// Start time in clock ticks since the guest's boot (`/proc/PID/stat`, field 22).
    pub start_ticks: u64,
}

/// The running mysqld.
///
/// # Errors
/// When none or more than one runs.
pub fn server(lab: &Lab) -> Result<Server> {
    let pid: u32 =
        guest(lab, "pgrep -x mysqld")?.trim().parse().context("not exactly one mysqld runs in the guest")?;
    let stat = guest(lab, &format!("cat /proc/{pid}/stat"))?;
    let start_ticks = stat
        .rsplit_once(')')
        .and_then(|(_, fields)| fields.split_whitespace().nth(19)?.parse().ok())
        .with_context(|| format!("cannot read the start time of process {pid}: {stat:?}"))?;
    Ok(Server { pid, start_ticks })
}

/// Asks the server.
///
/// # Errors
/// When the client or the server refuses.
pub fn query(lab: &Lab, sql: &str) -> Result<String> {
    ensure!(!sql.contains('\''), "a query here may not have single quotes: {sql}");
    guest(lab, &format!("{MYSQL} -e '{sql}'"))
}

/// All tables that a client made, as `schema.table`.
///
/// # Errors
/// When there is none, which would prove nothing.
pub fn tables(lab: &Lab) -> Result<Vec<String>> {
    let rows = query(
        lab,
        "SELECT CONCAT(table_schema, \".\", table_name) FROM information_schema.tables WHERE table_type = \"BASE TABLE\" \
         AND table_schema NOT IN (\"mysql\", \"sys\", \"information_schema\", \"performance_schema\") ORDER BY 1",
    )?;
    let tables: Vec<String> = rows.lines().map(str::to_owned).collect();
    ensure!(!tables.is_empty(), "the guest's server has no table of its own: there is nothing to prove");
    Ok(tables)
}

/// The rows that a statement gives for each table. One after the other: an emulated processor takes up to two minutes for each.
fn of_each(lab: &Lab, statement: &str, tables: &[String]) -> Result<String> {
    ensure!(!tables.is_empty(), "{statement} of no table would prove nothing");
    tables.iter().map(|table| query(lab, &format!("{statement} {table}"))).collect()
}

/// The row checksum of each table.
///
/// # Errors
/// When a table cannot be read, or there is none.
pub fn checksums(lab: &Lab, tables: &[String]) -> Result<BTreeMap<String, u64>> {
    let sums = parse_checksums(&of_each(lab, "CHECKSUM TABLE", tables)?)?;
    ensure!(sums.len() == tables.len(), "{} checksums for {} tables", sums.len(), tables.len());
    Ok(sums)
}

/// The row checksums that another server gave for the same tables when the guest's disk was made.
///
/// # Errors
/// When the guest does not have them.
pub fn expected_checksums(lab: &Lab) -> Result<BTreeMap<String, u64>> {
    parse_checksums(&guest(lab, "cat /var/lib/lab-checksums")?)
}

/// Rows of `CHECKSUM TABLE`.
fn parse_checksums(rows: &str) -> Result<BTreeMap<String, u64>> {
    rows.lines()
        .map(|line| {
            let (table, sum) =
                line.split_once('\t').with_context(|| format!("unexpected checksum row {line:?}"))?;
            let sum = sum.parse().with_context(|| format!("table {table} has no checksum: {sum:?}"))?;
            Ok((table.to_owned(), sum))
        })
        .collect()
}

/// Has the server check every table; how many there are.
///
/// # Errors
/// When any of them is not `OK`, or there is none.
pub fn check_tables(lab: &Lab, tables: &[String]) -> Result<usize> {
    let rows = of_each(lab, "CHECK TABLE", tables)?;
    let sound = rows.lines().filter(|line| line.ends_with("\tstatus\tOK")).count();
    if sound != tables.len() {
        bail!("CHECK TABLE: {sound} of {} tables are OK:\n{rows}", tables.len());
    }
    Ok(sound)
}

/// The tables that a [`Writer`] writes to.
pub const WRITTEN: [&str; 2] = ["sbtest.sbtest1", "poolskip.log"];

/// A client in the guest that commits transactions without a pause and notes what it was told was committed.
///
/// Each transaction adds 1 to the `k` of one row of `sbtest.sbtest1` and a row to `poolskip.log`; so afterwards the sum over
/// `k` must have grown by the number of rows in the log, and each acknowledged number must be in it.
pub struct Writer {
    sum_before: u64,
}

impl Writer {
    /// Starts it, and waits for its first acknowledged transaction.
    ///
    /// # Errors
    /// When the server refuses, or nothing is ever acknowledged.
    pub fn start(lab: &Lab) -> Result<Self> {
        Self::start_with(lab, "", "")
    }

    /// The same with a second between two transactions, where the guest's processor is wanted for other things.
    ///
    /// # Errors
    /// Those of [`Writer::start`].
    pub fn start_slowly(lab: &Lab) -> Result<Self> {
        // Waiting for what never comes starts no process.
        Self::start_with(lab, "exec 9<> <(:); ", "read -r -t 1 -u 9; ")
    }

    fn start_with(lab: &Lab, before: &str, pause: &str) -> Result<Self> {
        query(
            lab,
            "CREATE DATABASE IF NOT EXISTS poolskip; DROP TABLE IF EXISTS poolskip.log; \
             CREATE TABLE poolskip.log (n BIGINT PRIMARY KEY)",
        )?;
        let rows: u64 = number(lab, "SELECT COUNT(*) FROM sbtest.sbtest1")?;
        let sum_before = number(lab, "SELECT SUM(k) FROM sbtest.sbtest1")?;
        guest(
            lab,
            &format!(
                "{before}n=0; while :; do {pause}n=$((n+1)); echo \"BEGIN; UPDATE sbtest.sbtest1 SET k = k + 1 WHERE id = 1 + ($n * 7919) % {rows}; \
                 INSERT INTO poolskip.log VALUES ($n); COMMIT; SELECT $n;\"; done 2>/dev/null | {MYSQL} --unbuffered \
                 >/run/writer.acknowledged 2>/run/writer.errors & echo $! >/run/writer.pid; \
                 for i in $(seq 600); do [ -s /run/writer.acknowledged ] && exit 0; sleep 0.5; done; \
                 cat /run/writer.errors >&2; exit 1"
            ),
        )?;
        Ok(Self { sum_before })
    }

    /// How many transactions were acknowledged up to now.
    ///
    /// # Errors
    /// When the guest cannot be reached.
    pub fn acknowledged(&self, lab: &Lab) -> Result<u64> {
        guest(lab, "wc -l </run/writer.acknowledged")?
            .trim()
            .parse()
            .context("cannot count acknowledged transactions")
    }

    /// Ends it and compares: the number of acknowledged transactions.
    ///
    /// # Errors
    /// When one of them is missing, or the rows that they changed do not add up.
    pub fn finish(self, lab: &Lab) -> Result<u64> {
        guest(
            lab,
            "pid=$(cat /run/writer.pid); kill $pid; for i in $(seq 300); do kill -0 $pid 2>/dev/null || exit 0; sleep 0.2; \
             done; echo 'the writer does not end' >&2; exit 1",
        )?;
        // A transaction in flight at the kill may still be rolling back or committing: wait until its connection is gone.
        guest(
            lab,
            &format!(
                "for i in $(seq 300); do [ \"$({MYSQL} -e 'SELECT COUNT(*) FROM information_schema.innodb_trx')\" = 0 ] && exit 0; \
                 sleep 0.5; done; echo 'a transaction never ends' >&2; exit 1"
            ),
        )?;
        let acknowledged: Vec<u64> = guest(lab, "cat /run/writer.acknowledged")?
            .lines()
            .map(|line| line.parse().with_context(|| format!("the writer was told {line:?}")))
            .collect::<Result<_>>()?;
        let last = *acknowledged.last().context("no transaction was acknowledged")?;
        ensure!(
            acknowledged.iter().copied().eq(1..=last),
            "the writer's acknowledgements are not 1 to {last} in order"
        );
        let present = number(lab, &format!("SELECT COUNT(*) FROM poolskip.log WHERE n <= {last}"))?;
        ensure!(present == last, "{last} transactions were acknowledged, {present} of them are in the table");
        let committed = number(lab, "SELECT COUNT(*) FROM poolskip.log")?;
        ensure!(
            committed <= last + 1,
            "{committed} transactions in the table, {last} acknowledged, one at a time"
        );
        let sum = number(lab, "SELECT SUM(k) FROM sbtest.sbtest1")?;
        ensure!(
            sum == self.sum_before + committed,
            "{committed} transactions added 1 each, but the sum went from {} to {sum}",
            self.sum_before
        );
        Ok(last)
    }
}

fn number(lab: &Lab, sql: &str) -> Result<u64> {
    let words = query(lab, sql)?;
    words.trim().parse().with_context(|| format!("`{sql}` gave {words:?}, not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_by_table() {
        let sums = parse_checksums("sbtest.sbtest1\t123\nsbtest.sbtest2\t0\n").unwrap();
        assert_eq!(sums["sbtest.sbtest1"], 123);
        assert_eq!(sums.len(), 2);
    }

    #[test]
    fn a_table_that_cannot_be_read_has_no_checksum() {
        assert!(parse_checksums("sbtest.sbtest1\tNULL\n").is_err());
        assert!(parse_checksums("garbage\n").is_err());
    }
}
