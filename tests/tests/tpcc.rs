//! The TPC-C generator against a real server: it loads, runs, checks, and its check notices what is wrong.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::server::Server;
use tests::tpcc::TpccError;
use tests::tpcc::check::check;
use tests::tpcc::load::load;
use tests::tpcc::scale::Scale;
use tests::tpcc::terminal::{Run, run};

/// For each condition: what breaks it and only it, and what mends it again.
const PLANTED: [(u32, &str, &str); 4] = [
    (
        1,
        "UPDATE warehouse SET w_ytd = w_ytd + 0.01 WHERE w_id = 2",
        "UPDATE warehouse SET w_ytd = w_ytd - 0.01 WHERE w_id = 2",
    ),
    (
        2,
        "UPDATE district SET d_next_o_id = d_next_o_id + 1 WHERE d_w_id = 1 AND d_id = 7",
        "UPDATE district SET d_next_o_id = d_next_o_id - 1 WHERE d_w_id = 1 AND d_id = 7",
    ),
    (
        3,
        "SELECT MIN(no_o_id) + 1 INTO @o FROM new_order WHERE no_w_id = 1 AND no_d_id = 3;
         DELETE FROM new_order WHERE no_w_id = 1 AND no_d_id = 3 AND no_o_id = @o",
        "SELECT MIN(no_o_id) + 1 INTO @o FROM new_order WHERE no_w_id = 1 AND no_d_id = 3;
         INSERT INTO new_order VALUES (@o, 3, 1)",
    ),
    (
        4,
        "CREATE TABLE kept AS SELECT * FROM order_line WHERE ol_w_id = 2 AND ol_d_id = 10 AND ol_o_id = 5 AND ol_number = 5;
         DELETE FROM order_line WHERE ol_w_id = 2 AND ol_d_id = 10 AND ol_o_id = 5 AND ol_number = 5",
        "INSERT INTO order_line SELECT * FROM kept; DROP TABLE kept",
    ),
];

#[test]
fn tpcc_runs_stays_consistent_and_its_check_notices_each_planted_fault() -> Result<()> {
    let server = Server::start(&[])?;
    let socket = server.socket();
    let stop = AtomicBool::new(false);
    let how = Run { threads: 6, limit: Duration::from_secs(600), step: Duration::from_millis(200), seed: 5 };

    let nothing = run(&socket, how, &stop, &mut Vec::new());
    ensure!(matches!(nothing, Err(TpccError::NotLoaded { .. })), "without tables: {nothing:?}");

    let scale = Scale::new(2, 3)?;
    load(&socket, scale, 2, 11)?;
    let loaded = check(&socket)?;
    ensure!(loaded.violations.is_empty(), "after the load: {:?}", loaded.violations);
    ensure!((loaded.districts, loaded.orders) == (20, 20 * 90), "{loaded:?}");
    for (table, rows) in
        [("item", 3000), ("stock", 6000), ("customer", 1800), ("history", 1800), ("new_order", 540)]
    {
        let found = server.sql(&format!("SELECT COUNT(*) FROM tpcc.{table}"))?;
        ensure!(found.trim() == rows.to_string(), "{table} has {found} rows, not {rows}");
    }

    let mut out = Stopping { lines: Vec::new(), stop: &stop, wanted: 2000 };
    let counts = run(&socket, how, &stop, &mut out)?;
    ensure!(counts.committed() >= 2000, "{counts:?}");
    let share = |number: u64| 100 * number / counts.committed();
    // Decks of 100 cards: off by what is left of six of them.
    ensure!((43..=47).contains(&share(counts.new_order)), "{counts:?}");
    ensure!((41..=46).contains(&share(counts.payment)), "{counts:?}");
    ensure!(counts.order_status > 0 && counts.delivery > 0 && counts.stock_level > 0, "{counts:?}");
    ensure!(counts.rolled_back > 0, "one New-Order in a hundred is to be rolled back: {counts:?}");
    let ran = check(&socket)?;
    ensure!(ran.violations.is_empty(), "after the run: {:?}", ran.violations);
    ensure!(ran.orders == loaded.orders + counts.new_order, "{} orders: {counts:?}", ran.orders);
    let payments = server.sql("SELECT COUNT(*) FROM tpcc.history")?;
    ensure!(payments.trim() == (1800 + counts.payment).to_string(), "{payments} payments: {counts:?}");

    for (condition, breaking, mending) in PLANTED {
        server.sql(&format!("USE tpcc; {breaking}"))?;
        let found: Vec<u32> = check(&socket)?.violations.iter().map(|found| found.condition).collect();
        ensure!(found == [condition], "a fault of condition {condition} was planted, {found:?} were found");
        server.sql(&format!("USE tpcc; {mending}")).context("mending")?;
        ensure!(check(&socket)?.violations.is_empty(), "condition {condition} was mended");
    }

    server.sql("DELETE FROM tpcc.district WHERE d_w_id = 1 AND d_id = 1")?;
    ensure!(matches!(check(&socket), Err(TpccError::Missing { .. })), "a district is gone");
    Ok(())
}

/// Stops the run when enough was committed.
struct Stopping<'a> {
    lines: Vec<u8>,
    stop: &'a AtomicBool,
    wanted: u64,
}

impl std::io::Write for Stopping<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.lines.extend_from_slice(bytes);
        let committed: u64 = String::from_utf8_lossy(&self.lines)
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter_map(|line| line["committed"].as_u64())
            .sum();
        self.stop.fetch_or(committed >= self.wanted, std::sync::atomic::Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
