//! TPC-C on a MySQL server: schema, load, the five transactions in the standard's mix, and its consistency conditions 1 to 4. It runs
//! in the lab's guest and on this machine, over the server's unix socket.
//!
//! Clauses are those of the TPC Benchmark C Standard Specification, revision 5.11. What is not as the standard has it:
//!
//! - Keying and think times are off (5.2.5), so that a few threads load the server: results are not tpmC, and are never called so.
//! - Delivery runs in its terminal and not deferred (2.7.2.2).
//! - Primary keys are declared, foreign keys are not.
//! - A scale below 100 % shrinks items, customers and orders of each warehouse (1.2.1), for guests whose pool does not hold a whole one.

pub mod check;
pub mod error;
pub mod load;
pub mod random;
pub mod scale;
pub mod schema;
pub mod terminal;
pub mod timeline;
pub mod transactions;

use std::path::Path;

use mysql::{Conn, OptsBuilder};

pub use error::TpccError;

/// The schema that everything lies in.
pub const DATABASE: &str = "tpcc";

/// Connects to the server as root over its socket.
///
/// # Errors
/// When nothing listens there, or the server refuses root without a password.
pub fn connect(socket: &Path) -> Result<Conn, TpccError> {
    let options = OptsBuilder::new()
        .socket(Some(socket.to_string_lossy().into_owned()))
        .user(Some("root"))
        // Each transaction has about thirty statements, of five kinds: none of them is ever to be prepared twice.
        .stmt_cache_size(Some(128));
    Conn::new(options).map_err(|source| TpccError::Connect { socket: socket.to_owned(), source })
}
