//! How many rows there are (1.2.1), and what a run must know of the load.

use mysql::prelude::Queryable;
use mysql::{Conn, Row};

use super::TpccError;
use super::error::at;

/// Districts of a warehouse, at any scale.
pub const DISTRICTS: u32 = 10;

/// Cardinalities of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// W.
    pub warehouses: u32,
    /// Of the standard's items, customers and orders; 100 is the standard.
    pub percent: u32,
}

impl Scale {
    /// Checks the range of both.
    ///
    /// # Errors
    /// When there is no warehouse or more than 10,000, or the scale is not of 1 to 100 %.
    pub fn new(warehouses: u32, percent: u32) -> Result<Self, TpccError> {
        if !(1..=10_000).contains(&warehouses) {
            let value = u64::from(warehouses);
            return Err(TpccError::Parameter { name: "warehouses", value, allowed: "1 to 10000" });
        }
        if !(1..=100).contains(&percent) {
            let value = u64::from(percent);
            return Err(TpccError::Parameter { name: "scale", value, allowed: "1 to 100 %" });
        }
        Ok(Self { warehouses, percent })
    }

    /// Whether all cardinalities are the standard's.
    pub fn is_standard(self) -> bool {
        self.percent == 100
    }

    /// Rows of ITEM, and of STOCK for each warehouse.
    pub fn items(self) -> u32 {
        1000 * self.percent
    }

    /// Customers of each district, and the orders that it is loaded with.
    pub fn customers(self) -> u32 {
        30 * self.percent
    }

    /// Of these orders, the last ones are not delivered yet: the first that is not.
    pub fn first_undelivered(self) -> u32 {
        // 2101 of 3000.
        21 * self.percent + 1
    }

    /// A line for people.
    pub fn describe(self) -> String {
        if self.is_standard() {
            format!("{} warehouses at the standard's scale", self.warehouses)
        } else {
            format!(
                "{} warehouses at {} % of the standard's scale ({} items, {} customers a district): BELOW THE STANDARD",
                self.warehouses,
                self.percent,
                self.items(),
                self.customers()
            )
        }
    }
}

/// What was loaded: the scale, and the constant that C_LAST was drawn with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The cardinalities.
    pub scale: Scale,
    /// C of NURand for C_LAST.
    pub last_name_constant: u32,
}

impl Loaded {
    /// Notes it in the database, once everything else is there.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn write(self, conn: &mut Conn) -> Result<(), TpccError> {
        conn.exec_drop(
            "INSERT INTO poolskip_load (warehouses, percent, last_name_constant) VALUES (?, ?, ?)",
            (self.scale.warehouses, self.scale.percent, self.last_name_constant),
        )
        .map_err(at("noting what was loaded"))
    }

    /// Reads it.
    ///
    /// # Errors
    /// When nothing was loaded, or not to the end.
    pub fn read(conn: &mut Conn) -> Result<Self, TpccError> {
        let missing = |reason: String| TpccError::NotLoaded { reason };
        let row: Option<Row> = conn
            .query_first("SELECT warehouses, percent, last_name_constant FROM tpcc.poolskip_load")
            .map_err(|error| missing(error.to_string()))?;
        let row = row.ok_or_else(|| missing("a load was begun and did not end".into()))?;
        let (warehouses, percent, last_name_constant) =
            mysql::from_row_opt(row).map_err(|error| missing(error.to_string()))?;
        Ok(Self { scale: Scale::new(warehouses, percent)?, last_name_constant })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_scale_is_the_standard_s() {
        let scale = Scale::new(3, 100).unwrap();
        assert_eq!((scale.items(), scale.customers(), scale.first_undelivered()), (100_000, 3000, 2101));
        assert!(scale.is_standard());
        assert!(!scale.describe().contains("BELOW"));
    }

    #[test]
    fn a_smaller_scale_says_so() {
        assert!(Scale::new(1, 5).unwrap().describe().contains("BELOW THE STANDARD"));
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        assert!(Scale::new(0, 100).is_err() && Scale::new(1, 0).is_err() && Scale::new(1, 101).is_err());
    }
}
