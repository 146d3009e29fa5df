//! Consistency conditions 1 to 4 (3.3.2).

use std::fmt;
use std::path::Path;

use mysql::prelude::Queryable;

use super::error::at;
use super::scale::{DISTRICTS, Loaded};
use super::{DATABASE, TpccError, connect};

/// A condition: where it stands in the standard, and a query for the warehouses or districts that do not fulfil it. Queries return
/// warehouse, district (0 where the condition is of the warehouse), and both sides of the condition in words.
const CONDITIONS: [(u32, &str); 4] = [
    (
        1,
        "SELECT w_id, 0, CONCAT('W_YTD is ', w_ytd), CONCAT('sum of D_YTD is ', total)
         FROM warehouse JOIN (SELECT d_w_id, SUM(d_ytd) total FROM district GROUP BY d_w_id) d ON d_w_id = w_id
         WHERE w_ytd <> total",
    ),
    (
        // It does not apply to NEW-ORDER where a district has no order outstanding.
        2,
        "SELECT d_w_id, d_id, CONCAT('D_NEXT_O_ID - 1 is ', d_next_o_id - 1),
            CONCAT('max(O_ID) is ', COALESCE(o, 'none'), ', max(NO_O_ID) is ', COALESCE(n, 'none'))
         FROM district
         LEFT JOIN (SELECT o_w_id, o_d_id, MAX(o_id) o FROM orders GROUP BY 1, 2) a ON o_w_id = d_w_id AND o_d_id = d_id
         LEFT JOIN (SELECT no_w_id, no_d_id, MAX(no_o_id) n FROM new_order GROUP BY 1, 2) b
            ON no_w_id = d_w_id AND no_d_id = d_id
         WHERE o IS NULL OR d_next_o_id - 1 <> o OR d_next_o_id - 1 <> COALESCE(n, d_next_o_id - 1)",
    ),
    (
        3,
        "SELECT no_w_id, no_d_id, CONCAT('max - min + 1 of NO_O_ID is ', MAX(no_o_id) - MIN(no_o_id) + 1),
            CONCAT('rows of NEW-ORDER are ', COUNT(*))
         FROM new_order GROUP BY 1, 2 HAVING MAX(no_o_id) - MIN(no_o_id) + 1 <> COUNT(*)",
    ),
    (
        4,
        "SELECT o_w_id, o_d_id, CONCAT('sum of O_OL_CNT is ', counted), CONCAT('rows of ORDER-LINE are ', COALESCE(n, 0))
         FROM (SELECT o_w_id, o_d_id, SUM(o_ol_cnt) counted FROM orders GROUP BY 1, 2) a
         LEFT JOIN (SELECT ol_w_id, ol_d_id, COUNT(*) n FROM order_line GROUP BY 1, 2) b
            ON ol_w_id = o_w_id AND ol_d_id = o_d_id
         WHERE counted <> COALESCE(n, 0)",
    ),
];

/// A condition that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Its number in 3.3.2.
    pub condition: u32,
    /// The warehouse.
    pub warehouse: u32,
    /// The district; 0 where the condition is of a whole warehouse.
    pub district: u32,
    /// One side of it.
    pub left: String,
    /// The other.
    pub right: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "condition 3.3.2.{} does not hold in warehouse {}", self.condition, self.warehouse)?;
        if self.district > 0 {
            write!(f, ", district {}", self.district)?;
        }
        write!(f, ": {}, but {}", self.left, self.right)
    }
}

/// What was looked at, and what is wrong with it.
#[derive(Clone, Debug)]
pub struct Checked {
    /// What the tables say they were loaded as.
    pub loaded: Loaded,
    /// Districts that were looked at.
    pub districts: u64,
    /// Orders in them.
    pub orders: u64,
    /// Where a condition does not hold.
    pub violations: Vec<Violation>,
}

/// Checks all warehouses, in one snapshot of the database: other clients may go on.
///
/// # Errors
/// When nothing was loaded, the server refuses, or rows are so gone that there is nothing to check.
pub fn check(socket: &Path) -> Result<Checked, TpccError> {
    let mut conn = connect(socket)?;
    let loaded = Loaded::read(&mut conn)?;
    conn.select_db(DATABASE).map_err(at("choosing the schema"))?;
    conn.query_drop("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        .map_err(at("beginning a snapshot"))?;
    let mut count = |sql: &str| -> Result<u64, TpccError> {
        Ok(conn.query_first(sql).map_err(at("counting rows"))?.unwrap_or(0))
    };
    let districts = count("SELECT COUNT(*) FROM district JOIN warehouse ON w_id = d_w_id")?;
    let orders = count("SELECT COUNT(*) FROM orders")?;
    let expected = u64::from(loaded.scale.warehouses * DISTRICTS);
    if districts != expected {
        let what = format!("{} of {expected} districts", expected.saturating_sub(districts));
        return Err(TpccError::Missing { what });
    }
    let mut violations = Vec::new();
    for (condition, query) in CONDITIONS {
        let found: Vec<Violation> = conn
            .query_map(query, |(warehouse, district, left, right)| Violation {
                condition,
                warehouse,
                district,
                left,
                right,
            })
            .map_err(at("checking a consistency condition"))?;
        violations.extend(found);
    }
    Ok(Checked { loaded, districts, orders, violations })
}
