//! The five transactions (2.4 to 2.8), each with the inputs that its clause draws.

use mysql::prelude::Queryable;
use mysql::{Params, Row, Transaction, TxOpts, from_row_opt};

use super::TpccError;
use super::error::at;
use super::random::{LAST_NAMES, Random, money};
use super::scale::{DISTRICTS, Scale};

/// One of the five.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 2.4: takes an order of 5 to 15 lines.
    NewOrder,
    /// 2.5: a customer pays.
    Payment,
    /// 2.6: a customer asks for the last order.
    OrderStatus,
    /// 2.7: the oldest order of each district is delivered.
    Delivery,
    /// 2.8: how many of the items sold last are running out.
    StockLevel,
}

impl Kind {
    /// All, with their share of the mix in percent. The standard gives the least share of all but New-Order (5.2.3); this is what
    /// remains for New-Order.
    pub const MIX: [(Self, usize); 5] = [
        (Self::NewOrder, 45),
        (Self::Payment, 43),
        (Self::OrderStatus, 4),
        (Self::Delivery, 4),
        (Self::StockLevel, 4),
    ];
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Its changes are in the database.
    Committed,
    /// New-Order with the one item in a hundred orders that nobody sells (2.4.1.4): it had to be rolled back, and was.
    RolledBack,
}

/// Where a terminal stands, and in what database.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Cardinalities.
    pub scale: Scale,
    /// The terminal's warehouse.
    pub warehouse: u32,
    /// The terminal's district, for Stock-Level (2.8.1.1).
    pub district: u32,
}

/// How a customer is named: 60 in 100 by last name (2.5.1.2).
#[derive(Clone, Debug, PartialEq, Eq)]
enum Customer {
    Number(u32),
    LastName(String),
}

impl Place {
    /// Draws the inputs of a transaction and runs it, once.
    ///
    /// # Errors
    /// The server's, transient ones ([`TpccError::is_transient`]) among them: nothing of the transaction is then in the database. The
    /// caller tries again with a `random` of the same state, so that it is the same transaction.
    pub fn run(&self, conn: &mut mysql::Conn, kind: Kind, random: &mut Random) -> Result<Ended, TpccError> {
        let transaction = conn.start_transaction(TxOpts::default()).map_err(at("BEGIN"))?;
        let mut open = Open { transaction };
        let ended = match kind {
            Kind::NewOrder => self.new_order(&mut open, random)?,
            Kind::Payment => self.payment(&mut open, random)?,
            Kind::OrderStatus => self.order_status(&mut open, random)?,
            Kind::Delivery => self.delivery(&mut open, random)?,
            Kind::StockLevel => self.stock_level(&mut open, random)?,
        };
        match ended {
            Ended::Committed => open.transaction.commit().map_err(at("COMMIT"))?,
            Ended::RolledBack => open.transaction.rollback().map_err(at("ROLLBACK"))?,
        }
        Ok(ended)
    }

    fn customer(&self, random: &mut Random) -> Customer {
        if random.percent(60) {
            Customer::LastName(random.last_name(self.scale.customers().min(LAST_NAMES)))
        } else {
            Customer::Number(random.customer(self.scale.customers()))
        }
    }

    /// Another warehouse than ours, if there is one.
    fn other_warehouse(&self, random: &mut Random) -> u32 {
        if self.scale.warehouses < 2 {
            return self.warehouse;
        }
        let drawn = random.uniform(1, self.scale.warehouses - 1);
        if drawn < self.warehouse { drawn } else { drawn + 1 }
    }

    fn new_order(&self, open: &mut Open<'_>, random: &mut Random) -> Result<Ended, TpccError> {
        let (warehouse, district) = (self.warehouse, random.uniform(1, DISTRICTS));
        let customer = random.customer(self.scale.customers());
        let count = random.uniform(5, 15);
        let unsold = random.percent(1);
        let mut lines = Vec::new();
        for number in 1..=count {
            let item = if unsold && number == count {
                self.scale.items() + 1
            } else {
                random.item(self.scale.items())
            };
            let supplier = if random.percent(1) { self.other_warehouse(random) } else { warehouse };
            lines.push((number, item, supplier, random.uniform(1, 10)));
        }
        let all_local = u32::from(lines.iter().all(|line| line.2 == warehouse));

        let (_discount, _last, _credit, _tax): (f64, String, String, f64) = open.one(
            "SELECT c_discount, c_last, c_credit, w_tax FROM customer JOIN warehouse ON w_id = c_w_id
             WHERE w_id = ? AND c_d_id = ? AND c_id = ?",
            (warehouse, district, customer),
        )?;
        let (order, _tax): (u32, f64) = open.one(
            "SELECT d_next_o_id, d_tax FROM district WHERE d_w_id = ? AND d_id = ? FOR UPDATE",
            (warehouse, district),
        )?;
        open.change(
            "UPDATE district SET d_next_o_id = ? WHERE d_w_id = ? AND d_id = ?",
            (order + 1, warehouse, district),
        )?;
        open.change(
            "INSERT INTO orders (o_id, o_d_id, o_w_id, o_c_id, o_entry_d, o_ol_cnt, o_all_local) VALUES (?, ?, ?, ?, NOW(), ?, ?)",
            (order, district, warehouse, customer, count, all_local),
        )?;
        open.change("INSERT INTO new_order VALUES (?, ?, ?)", (order, district, warehouse))?;
        for (number, item, supplier, quantity) in lines {
            let found: Option<(f64, String, String)> =
                open.first("SELECT i_price, i_name, i_data FROM item WHERE i_id = ?", (item,))?;
            let Some((price, _name, _data)) = found else { return Ok(Ended::RolledBack) };
            let query = format!(
                "SELECT s_quantity, s_data, s_dist_{district:02} FROM stock WHERE s_w_id = ? AND s_i_id = ? FOR UPDATE"
            );
            let (left, _data, info): (u32, String, String) = open.one(&query, (supplier, item))?;
            let left = if left >= quantity + 10 { left - quantity } else { left + 91 - quantity };
            open.change(
                "UPDATE stock SET s_quantity = ?, s_ytd = s_ytd + ?, s_order_cnt = s_order_cnt + 1, s_remote_cnt = s_remote_cnt + ?
                 WHERE s_w_id = ? AND s_i_id = ?",
                (left, quantity, u32::from(supplier != warehouse), supplier, item),
            )?;
            // A price has two decimals and is below 101: exact in cents.
            let amount = money((price * 100.0).round() as i64 * i64::from(quantity));
            open.change(
                "INSERT INTO order_line VALUES (?, ?, ?, ?, ?, ?, NULL, ?, ?, ?)",
                (order, district, warehouse, number, item, supplier, quantity, amount, info),
            )?;
        }
        Ok(Ended::Committed)
    }

    fn payment(&self, open: &mut Open<'_>, random: &mut Random) -> Result<Ended, TpccError> {
        let (warehouse, district) = (self.warehouse, random.uniform(1, DISTRICTS));
        // 85 in 100 pay where they are at home (2.5.1.2).
        let (home, home_district) = if random.percent(85) {
            (warehouse, district)
        } else {
            (self.other_warehouse(random), random.uniform(1, DISTRICTS))
        };
        let customer = self.customer(random);
        let amount = random.money(100, 500_000);

        open.change("UPDATE warehouse SET w_ytd = w_ytd + ? WHERE w_id = ?", (&amount, warehouse))?;
        let (warehouse_name, _city): (String, String) =
            open.one("SELECT w_name, w_city FROM warehouse WHERE w_id = ?", (warehouse,))?;
        open.change(
            "UPDATE district SET d_ytd = d_ytd + ? WHERE d_w_id = ? AND d_id = ?",
            (&amount, warehouse, district),
        )?;
        let (district_name, _city): (String, String) = open.one(
            "SELECT d_name, d_city FROM district WHERE d_w_id = ? AND d_id = ?",
            (warehouse, district),
        )?;
        let customer = open.customer_number(home, home_district, customer)?;
        let (credit, data): (String, String) = open.one(
            "SELECT c_credit, c_data FROM customer WHERE c_w_id = ? AND c_d_id = ? AND c_id = ? FOR UPDATE",
            (home, home_district, customer),
        )?;
        // Only of those with bad credit the data says what they paid (2.5.2.2).
        let data = if credit == "BC" {
            let mut told =
                format!("{customer} {home_district} {home} {district} {warehouse} {amount}|{data}");
            told.truncate(500);
            told
        } else {
            data
        };
        open.change(
            "UPDATE customer SET c_balance = c_balance - ?, c_ytd_payment = c_ytd_payment + ?, c_payment_cnt = c_payment_cnt + 1,
             c_data = ? WHERE c_w_id = ? AND c_d_id = ? AND c_id = ?",
            (&amount, &amount, data, home, home_district, customer),
        )?;
        open.change(
            "INSERT INTO history VALUES (?, ?, ?, ?, ?, NOW(), ?, ?)",
            (
                customer,
                home_district,
                home,
                district,
                warehouse,
                &amount,
                format!("{warehouse_name}    {district_name}"),
            ),
        )?;
        Ok(Ended::Committed)
    }

    fn order_status(&self, open: &mut Open<'_>, random: &mut Random) -> Result<Ended, TpccError> {
        let (warehouse, district) = (self.warehouse, random.uniform(1, DISTRICTS));
        let customer = self.customer(random);
        let customer = open.customer_number(warehouse, district, customer)?;
        let (_balance, _first, _last): (f64, String, String) = open.one(
            "SELECT c_balance, c_first, c_last FROM customer WHERE c_w_id = ? AND c_d_id = ? AND c_id = ?",
            (warehouse, district, customer),
        )?;
        let (order,): (u32,) = open.one(
            "SELECT o_id FROM orders WHERE o_w_id = ? AND o_d_id = ? AND o_c_id = ? ORDER BY o_id DESC LIMIT 1",
            (warehouse, district, customer),
        )?;
        let lines = open.all(
            "SELECT ol_i_id, ol_supply_w_id, ol_quantity, ol_amount, ol_delivery_d FROM order_line
             WHERE ol_w_id = ? AND ol_d_id = ? AND ol_o_id = ?",
            (warehouse, district, order),
        )?;
        if lines.is_empty() {
            return Err(TpccError::Missing {
                what: format!("every line of order {order} in district {district}"),
            });
        }
        Ok(Ended::Committed)
    }

    fn delivery(&self, open: &mut Open<'_>, random: &mut Random) -> Result<Ended, TpccError> {
        let carrier = random.uniform(1, 10);
        let warehouse = self.warehouse;
        for district in 1..=DISTRICTS {
            let oldest: Option<(u32,)> = open.first(
                "SELECT no_o_id FROM new_order WHERE no_w_id = ? AND no_d_id = ? ORDER BY no_o_id LIMIT 1 FOR UPDATE",
                (warehouse, district),
            )?;
            // A district without an order outstanding is skipped (2.7.4.2).
            let Some((order,)) = oldest else { continue };
            open.change(
                "DELETE FROM new_order WHERE no_w_id = ? AND no_d_id = ? AND no_o_id = ?",
                (warehouse, district, order),
            )?;
            let (customer,): (u32,) = open.one(
                "SELECT o_c_id FROM orders WHERE o_w_id = ? AND o_d_id = ? AND o_id = ? FOR UPDATE",
                (warehouse, district, order),
            )?;
            open.change(
                "UPDATE orders SET o_carrier_id = ? WHERE o_w_id = ? AND o_d_id = ? AND o_id = ?",
                (carrier, warehouse, district, order),
            )?;
            open.change(
                "UPDATE order_line SET ol_delivery_d = NOW() WHERE ol_w_id = ? AND ol_d_id = ? AND ol_o_id = ?",
                (warehouse, district, order),
            )?;
            let (total,): (String,) = open.one(
                "SELECT CAST(SUM(ol_amount) AS CHAR) FROM order_line WHERE ol_w_id = ? AND ol_d_id = ? AND ol_o_id = ?",
                (warehouse, district, order),
            )?;
            open.change(
                "UPDATE customer SET c_balance = c_balance + ?, c_delivery_cnt = c_delivery_cnt + 1
                 WHERE c_w_id = ? AND c_d_id = ? AND c_id = ?",
                (total, warehouse, district, customer),
            )?;
        }
        Ok(Ended::Committed)
    }

    fn stock_level(&self, open: &mut Open<'_>, random: &mut Random) -> Result<Ended, TpccError> {
        let threshold = random.uniform(10, 20);
        let (next,): (u32,) = open.one(
            "SELECT d_next_o_id FROM district WHERE d_w_id = ? AND d_id = ?",
            (self.warehouse, self.district),
        )?;
        let (_low,): (u64,) = open.one(
            "SELECT COUNT(DISTINCT s_i_id) FROM order_line JOIN stock ON s_w_id = ol_w_id AND s_i_id = ol_i_id
             WHERE ol_w_id = ? AND ol_d_id = ? AND ol_o_id < ? AND ol_o_id >= ? AND s_quantity < ?",
            (self.warehouse, self.district, next, next.saturating_sub(20), threshold),
        )?;
        Ok(Ended::Committed)
    }
}

/// A transaction that is open; rolled back when dropped.
struct Open<'a> {
    transaction: Transaction<'a>,
}

impl Open<'_> {
    fn first<T: mysql::prelude::FromRow>(
        &mut self,
        sql: &str,
        parameters: impl Into<Params>,
    ) -> Result<Option<T>, TpccError> {
        let row: Option<Row> = self.transaction.exec_first(sql, parameters).map_err(at("reading rows"))?;
        row.map(|row| {
            from_row_opt(row).map_err(|error| TpccError::Missing {
                what: format!("a value as the schema has it, in `{sql}`: {error}"),
            })
        })
        .transpose()
    }

    fn one<T: mysql::prelude::FromRow>(
        &mut self,
        sql: &str,
        parameters: impl Into<Params>,
    ) -> Result<T, TpccError> {
        self.first(sql, parameters)?.ok_or_else(|| TpccError::Missing { what: format!("the row of `{sql}`") })
    }

    fn all(&mut self, sql: &str, parameters: impl Into<Params>) -> Result<Vec<Row>, TpccError> {
        self.transaction.exec(sql, parameters).map_err(at("reading rows"))
    }

    fn change(&mut self, sql: &str, parameters: impl Into<Params>) -> Result<(), TpccError> {
        self.transaction.exec_drop(sql, parameters).map_err(at("changing rows"))
    }

    /// Of those with the same last name, the one in the middle by first name, rounded up (2.5.2.2).
    fn customer_number(
        &mut self,
        warehouse: u32,
        district: u32,
        customer: Customer,
    ) -> Result<u32, TpccError> {
        let name = match customer {
            Customer::Number(number) => return Ok(number),
            Customer::LastName(name) => name,
        };
        let numbers: Vec<u32> = self
            .transaction
            .exec(
                "SELECT c_id FROM customer WHERE c_w_id = ? AND c_d_id = ? AND c_last = ? ORDER BY c_first",
                (warehouse, district, &name),
            )
            .map_err(at("reading rows"))?;
        let middle = numbers.len().div_ceil(2).saturating_sub(1);
        numbers.get(middle).copied().ok_or_else(|| TpccError::Missing {
            what: format!("customer {name} of warehouse {warehouse}, district {district}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tpcc::random::Constants;

    fn place(warehouses: u32, warehouse: u32) -> Place {
        Place { scale: Scale { warehouses, percent: 100 }, warehouse, district: 1 }
    }

    fn random() -> Random {
        Random::new(3, Constants { last_name: 1, customer: 2, item: 3 })
    }

    #[test]
    fn the_mix_is_the_whole() {
        assert_eq!(Kind::MIX.iter().map(|(_, share)| share).sum::<usize>(), 100);
    }

    #[test]
    fn six_of_ten_customers_are_named_by_last_name() {
        let mut random = random();
        let named = (0..10_000)
            .filter(|_| matches!(place(1, 1).customer(&mut random), Customer::LastName(_)))
            .count();
        assert!((5700..6300).contains(&named), "{named}");
    }

    #[test]
    fn another_warehouse_is_another_one_where_there_is_one() {
        let mut random = random();
        let mut seen = [false; 5];
        for _ in 0..1000 {
            let other = place(4, 2).other_warehouse(&mut random);
            assert!(other != 2 && (1..=4).contains(&other));
            seen[other as usize] = true;
        }
        assert_eq!(seen, [false, true, false, true, true]);
        assert_eq!(place(1, 1).other_warehouse(&mut random), 1);
    }
}
