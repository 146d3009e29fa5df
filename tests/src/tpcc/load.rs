//! Fills the tables (4.3.3).

use std::fmt::{Display, Write};
use std::path::Path;

use mysql::Conn;
use mysql::prelude::Queryable;

use super::error::at;
use super::random::{Constants, LAST_NAMES, Random, last_name};
use super::scale::{DISTRICTS, Loaded, Scale};
use super::{DATABASE, TpccError, connect, schema};

/// Bytes of one INSERT at most: few round trips, and far below what a server accepts.
const BATCH_BYTES: usize = 256 << 10;

/// Loads a database, one thread a warehouse up to `threads`. A load of the same seed and scale is the same but for its dates.
///
/// # Errors
/// When the server refuses; the tables are then not to be used, and a run says so.
pub fn load(socket: &Path, scale: Scale, threads: u32, seed: u64) -> Result<(), TpccError> {
    let constants = Constants::for_load(&mut fastrand::Rng::with_seed(seed));
    let mut conn = connect(socket)?;
    schema::create(&mut conn)?;
    items(&mut conn, scale, &mut Random::new(seed ^ 1, constants))?;
    let threads = threads.clamp(1, scale.warehouses);
    std::thread::scope(|scope| {
        let loaders: Vec<_> = (0..threads)
            .map(|first| {
                scope.spawn(move || {
                    let mut conn = connect(socket)?;
                    conn.select_db(DATABASE).map_err(at("choosing the schema"))?;
                    for number in (first + 1..=scale.warehouses).step_by(threads as usize) {
                        let seed = seed ^ (u64::from(number) << 32);
                        warehouse(&mut conn, scale, number, &mut Random::new(seed, constants))?;
                    }
                    Ok::<(), TpccError>(())
                })
            })
            .collect();
        // A loader that panics takes this thread with it.
        loaders.into_iter().try_for_each(|loader| match loader.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    conn.query_drop(
        "ANALYZE TABLE warehouse, district, customer, history, new_order, orders, order_line, item, stock",
    )
    .map_err(at("ANALYZE TABLE"))?;
    Loaded { scale, last_name_constant: constants.last_name }.write(&mut conn)
}

/// An INSERT that grows until it is worth a round trip.
struct Batch {
    table: &'static str,
    sql: String,
    rows: usize,
}

impl Batch {
    fn into(table: &'static str) -> Self {
        Self { table, sql: String::new(), rows: 0 }
    }

    /// Adds a row. Its text must be of letters and digits: it is put between quotes as it is.
    fn row(&mut self, conn: &mut Conn, values: &[&dyn Value]) -> Result<(), TpccError> {
        if self.rows == 0 {
            self.sql = format!("INSERT INTO {} VALUES ", self.table);
        } else {
            self.sql.push(',');
        }
        for (number, value) in values.iter().enumerate() {
            self.sql.push(if number == 0 { '(' } else { ',' });
            value.put(&mut self.sql);
        }
        self.sql.push(')');
        self.rows += 1;
        if self.sql.len() > BATCH_BYTES { self.flush(conn) } else { Ok(()) }
    }

    fn flush(&mut self, conn: &mut Conn) -> Result<(), TpccError> {
        if self.rows > 0 {
            conn.query_drop(&self.sql).map_err(at("loading rows"))?;
            self.rows = 0;
        }
        Ok(())
    }
}

/// A value in SQL.
trait Value {
    fn put(&self, sql: &mut String);
}

fn put(sql: &mut String, value: impl Display) {
    // Writing into a String cannot fail.
    let _ = write!(sql, "{value}");
}

impl Value for u32 {
    fn put(&self, sql: &mut String) {
        put(sql, self);
    }
}

impl Value for String {
    fn put(&self, sql: &mut String) {
        self.as_str().put(sql);
    }
}

impl Value for &str {
    fn put(&self, sql: &mut String) {
        put(sql, format_args!("'{self}'"));
    }
}

impl<T: Value> Value for Option<T> {
    fn put(&self, sql: &mut String) {
        match self {
            Some(value) => value.put(sql),
            None => sql.push_str("NULL"),
        }
    }
}

/// The time of the server.
struct Now;

impl Value for Now {
    fn put(&self, sql: &mut String) {
        sql.push_str("NOW()");
    }
}

/// Street 1 and 2, city, state and ZIP code (4.3.2.7).
fn address(random: &mut Random) -> [String; 5] {
    let state = random.text(2, 2).to_uppercase();
    let zip = random.digits(4) + "11111";
    [random.text(10, 20), random.text(10, 20), random.text(10, 20), state, zip]
}

/// A rate of 0 to `high` ten-thousandths.
fn rate(random: &mut Random, high: u32) -> String {
    format!("0.{:04}", random.uniform(0, high))
}

fn items(conn: &mut Conn, scale: Scale, random: &mut Random) -> Result<(), TpccError> {
    let mut batch = Batch::into("item");
    for id in 1..=scale.items() {
        let (image, name) = (random.uniform(1, 10_000), random.text(14, 24));
        let (price, data) = (random.money(100, 10_000), random.data());
        batch.row(conn, &[&id, &image, &name, &price, &data])?;
    }
    batch.flush(conn)
}

fn warehouse(conn: &mut Conn, scale: Scale, id: u32, random: &mut Random) -> Result<(), TpccError> {
    let mut batch = Batch::into("warehouse");
    let name = random.text(6, 10);
    let [street_1, street_2, city, state, zip] = address(random);
    let tax = rate(random, 2000);
    // 300,000.00 for 3,000 customers of each of 10 districts, who have paid 10.00 each.
    let paid = format!("{}.00", DISTRICTS * scale.customers() * 10);
    batch.row(conn, &[&id, &name, &street_1, &street_2, &city, &state, &zip, &tax, &paid])?;
    batch.flush(conn)?;
    stock(conn, scale, id, random)?;
    (1..=DISTRICTS).try_for_each(|number| district(conn, scale, id, number, random))
}

fn stock(conn: &mut Conn, scale: Scale, warehouse: u32, random: &mut Random) -> Result<(), TpccError> {
    let mut batch = Batch::into("stock");
    for item in 1..=scale.items() {
        let quantity = random.uniform(10, 100);
        let info: [String; 10] = std::array::from_fn(|_| random.text(24, 24));
        let data = random.data();
        let mut row: Vec<&dyn Value> = vec![&item, &warehouse, &quantity];
        row.extend(info.iter().map(|text| text as &dyn Value));
        row.extend([&0_u32 as &dyn Value, &0_u32, &0_u32, &data]);
        batch.row(conn, &row)?;
    }
    batch.flush(conn)
}

fn district(
    conn: &mut Conn,
    scale: Scale,
    warehouse: u32,
    id: u32,
    random: &mut Random,
) -> Result<(), TpccError> {
    let mut batch = Batch::into("district");
    let name = random.text(6, 10);
    let [street_1, street_2, city, state, zip] = address(random);
    let tax = rate(random, 2000);
    let paid = format!("{}.00", scale.customers() * 10);
    let next = scale.customers() + 1;
    batch.row(
        conn,
        &[&id, &warehouse, &name, &street_1, &street_2, &city, &state, &zip, &tax, &paid, &next],
    )?;
    batch.flush(conn)?;
    customers(conn, scale, warehouse, id, random)?;
    orders(conn, scale, warehouse, id, random)
}

fn customers(
    conn: &mut Conn,
    scale: Scale,
    warehouse: u32,
    district: u32,
    random: &mut Random,
) -> Result<(), TpccError> {
    let (mut customers, mut histories) = (Batch::into("customer"), Batch::into("history"));
    let names = scale.customers().min(LAST_NAMES);
    for id in 1..=scale.customers() {
        let first = random.text(8, 16);
        // Every name is there once; the other customers' are drawn.
        let last = if id <= names { last_name(id - 1) } else { random.last_name(names) };
        let [street_1, street_2, city, state, zip] = address(random);
        let phone = random.digits(16);
        let credit = if random.percent(10) { "BC" } else { "GC" };
        let (discount, data) = (rate(random, 5000), random.text(300, 500));
        customers.row(
            conn,
            &[
                &id,
                &district,
                &warehouse,
                &first,
                &"OE",
                &last,
                &street_1,
                &street_2,
                &city,
                &state,
                &zip,
                &phone,
                &Now,
                &credit,
                &"50000.00",
                &discount,
                &"-10.00",
                &"10.00",
                &1_u32,
                &0_u32,
                &data,
            ],
        )?;
        let data = random.text(12, 24);
        histories.row(conn, &[&id, &district, &warehouse, &district, &warehouse, &Now, &"10.00", &data])?;
    }
    customers.flush(conn)?;
    histories.flush(conn)
}

fn orders(
    conn: &mut Conn,
    scale: Scale,
    warehouse: u32,
    district: u32,
    random: &mut Random,
) -> Result<(), TpccError> {
    let (mut orders, mut lines, mut waiting) =
        (Batch::into("orders"), Batch::into("order_line"), Batch::into("new_order"));
    let mut of_customers: Vec<u32> = (1..=scale.customers()).collect();
    random.rng().shuffle(&mut of_customers);
    for (id, customer) in (1..).zip(of_customers) {
        let delivered = id < scale.first_undelivered();
        let carrier = delivered.then(|| random.uniform(1, 10));
        let count = random.uniform(5, 15);
        orders.row(conn, &[&id, &district, &warehouse, &customer, &Now, &carrier, &count, &1_u32])?;
        for number in 1..=count {
            let item = random.uniform(1, scale.items());
            let amount = if delivered { "0.00".into() } else { random.money(1, 999_999) };
            let info = random.text(24, 24);
            lines.row(
                conn,
                &[
                    &id,
                    &district,
                    &warehouse,
                    &number,
                    &item,
                    &warehouse,
                    &delivered.then_some(Now),
                    &5_u32,
                    &amount,
                    &info,
                ],
            )?;
        }
        if !delivered {
            waiting.row(conn, &[&id, &district, &warehouse])?;
        }
    }
    orders.flush(conn)?;
    lines.flush(conn)?;
    waiting.flush(conn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_the_server_reads_them() {
        let mut sql = String::new();
        for value in [&7_u32 as &dyn Value, &"x", &Some("y".to_owned()), &None::<u32>, &Now] {
            value.put(&mut sql);
            sql.push(' ');
        }
        assert_eq!(sql, "7 'x' 'y' NULL NOW() ");
    }
}
