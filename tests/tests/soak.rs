//! `cargo xtask test --soak`: a server under a load that reads and writes, with evictions, resizes of the pool and DDL, stopped at random
//! moments; whatever is listed then is on the disk byte for byte, and nearly all that could be listed is.

use std::env;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow, ensure};
use guest_probe::session::{Options, Session};
use guest_probe::storage_map::DiskRule;
use tests::listed::{compare, could_be_listed, lists};
use tests::server::Server;
use tests::truth::Memory;

/// Stops in all.
const STOPS: u32 = 50;

/// Seconds from the first stop to the last, without `POOLSKIP_SOAK_SECONDS`.
const SECONDS: u64 = 600;

/// What changes tables and pool, again and again.
const CHANGES: [&str; 9] = [
    "CREATE TABLE sbtest.churn AS SELECT id, k, c, pad FROM sbtest.sbtest1 LIMIT 20000",
    "SET GLOBAL innodb_buffer_pool_size = 201326592",
    "ALTER TABLE sbtest.churn ADD COLUMN more INT DEFAULT 7, ALGORITHM=COPY",
    "CREATE TABLE sbtest.packed (id INT PRIMARY KEY, c TEXT) ROW_FORMAT=COMPRESSED SELECT id, c FROM sbtest.churn LIMIT 5000",
    "RENAME TABLE sbtest.churn TO sbtest.renamed",
    "SET GLOBAL innodb_buffer_pool_size = 134217728",
    "TRUNCATE TABLE sbtest.renamed",
    "INSERT INTO sbtest.renamed SELECT id, k, c, pad, 1 FROM sbtest.sbtest2 LIMIT 10000",
    "DROP TABLE sbtest.renamed, sbtest.packed",
];

/// A small generator (xorshift64*): moments need to be spread, nothing more. The seed is printed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

fn change(server: &Server, over: &AtomicBool) -> Result<u64> {
    let mut rounds = 0;
    for sql in CHANGES.iter().cycle() {
        if over.load(Ordering::Relaxed) {
            break;
        }
        server.sql(sql)?;
        rounds += u64::from(*sql == CHANGES[CHANGES.len() - 1]);
        sleep(Duration::from_millis(300));
    }
    Ok(rounds)
}

#[test]
#[ignore = "ten minutes: `cargo xtask test --soak` runs it"]
fn whatever_is_listed_is_on_the_disk() -> Result<()> {
    let seconds = env::var("POOLSKIP_SOAK_SECONDS").map_or(Ok(SECONDS), |text| text.parse())?;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64 | 1;
    println!("{STOPS} stops in {seconds} s, seed {seed}");
    let mut random = Random(seed);
    let server = Server::start(&[])?;
    let memory = Memory::open(server.pid())?;
    let load = server.load(4)?;
    let options = Options { pid: Some(server.pid()), rule: DiskRule::Any, ..Options::default() };
    let mut session = Session::start(&options)?;
    let over = AtomicBool::new(false);
    let (mut pages, mut listed, mut could, mut unread) = (0, 0, 0, 0);
    let rounds = thread::scope(|scope| -> Result<u64> {
        let changing = scope.spawn(|| change(&server, &over));
        let result = (|| -> Result<()> {
            for stop in 1..=STOPS {
                // Twice the share at most, so that the mean is the share.
                let pause = Duration::from_millis(random.below(2 * seconds * 1000 / u64::from(STOPS)).max(1));
                let start = Instant::now();
                while start.elapsed() < pause {
                    sleep(Duration::from_millis(200).min(pause.saturating_sub(start.elapsed())));
                    // As the service does; a pool that is being resized cannot be read, and is tried again.
                    if let Err(error) = session.update() {
                        println!("  {error}");
                    }
                }
                ensure!(!changing.is_finished(), "the changes have ended early");
                let stopped = server.stop()?;
                match lists(&mut session) {
                    Ok((runs, summary)) => {
                        pages += compare(&runs, &server.disk, &memory)?;
                        let now = summary.frames_read + summary.frames_written;
                        let could_now = could_be_listed(&memory.control_blocks()?, &summary);
                        println!("  stop {stop}: {now} of {could_now} frames listed, {:?}", summary.left_out);
                        listed += now;
                        could += could_now;
                    }
                    // Stopped in the middle of a resize: nothing is listed then, and that is counted.
                    Err(error) => {
                        println!("  stop {stop}: nothing is listed: {error}");
                        unread += 1;
                        let blocks = memory.control_blocks().unwrap_or_default();
                        could += blocks.values().filter(|block| tests::listed::at_rest(block)).count() as u64;
                    }
                }
                drop(stopped);
            }
            Ok(())
        })();
        over.store(true, Ordering::Relaxed);
        let changed = changing.join().map_err(|_| anyhow!("the changes panicked"))?;
        result.and(changed)
    })?;
    drop(load);
    let (snapshots, _) = session.snapshots();
    println!(
        "{STOPS} stops ({unread} of them in the middle of a resize), {rounds} rounds of changes, {snapshots} snapshots: {pages} \
         guest pages equal to the disk, {listed} of {could} frames listed"
    );
    ensure!(pages > 0 && listed * 100 >= could * 95, "{listed} of {could} frames were listed");
    Ok(())
}
