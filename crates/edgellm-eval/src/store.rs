//! The store of results: one SQLite file.
//!
//! SQLite and not Parquet, because results come one by one: a transaction is there or not, whatever kills the process; a
//! table of figures answers questions of any tool; and a Parquet file would have to be written anew for each result. It is C,
//! so it is behind the feature `store`, which phones' libraries leave out.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use serde_json::Value;

use crate::compare::case_name;
use crate::figures::{RECORD_VERSION, Record};

/// Version of the tables.
const VERSION: i64 = 1;
/// How long a writer waits for another one.
const PATIENCE: Duration = Duration::from_secs(30);
const TABLES: &str = "
CREATE TABLE stages (
  key TEXT PRIMARY KEY, kind TEXT NOT NULL, command TEXT NOT NULL, seconds REAL NOT NULL, result TEXT NOT NULL);
CREATE TABLE runs (
  id TEXT NOT NULL, sweep TEXT NOT NULL, name TEXT NOT NULL, ended INTEGER NOT NULL, record TEXT NOT NULL,
  PRIMARY KEY (sweep, name));
CREATE INDEX runs_by_id ON runs (id);
CREATE TABLE figures (
  run TEXT NOT NULL, sweep TEXT NOT NULL, name TEXT NOT NULL, figure TEXT NOT NULL, value REAL, low REAL, high REAL,
  unit TEXT NOT NULL, PRIMARY KEY (sweep, name, figure));
";

/// What can go wrong with a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// SQLite refused.
    #[error("{path}: {reason}")]
    Database {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A newer program wrote it.
    #[error("{path}: expected results of version {expected} at most, found {found}; use a newer edgellm")]
    Newer {
        /// The file.
        path: PathBuf,
        /// What this program knows.
        expected: i64,
        /// What the file has.
        found: i64,
    },
    /// No such run or sweep.
    #[error("{path}: expected a run or a sweep that is there, found '{name}'; there are {known}")]
    Unknown {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The beginning of several ids.
    #[error("'{name}' begins {count} runs; give more of the id")]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// How many.
        count: usize,
    },
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    connection: Connection,
}

impl Store {
    /// Opens a store, or makes one.
    ///
    /// # Errors
    /// The file cannot be opened, is no store, or is of a newer version.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |e: rusqlite::Error| StoreError::Database { path: path.to_owned(), reason: e.to_string() };
        let mut connection = Connection::open(path).map_err(failed)?;
        connection.busy_timeout(PATIENCE).map_err(failed)?;
        // A result that was stored stays, even if the machine stops.
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        let transaction =
            connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).map_err(failed)?;
        let version: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
        match version {
            VERSION => {}
            0 => {
                transaction.execute_batch(TABLES).map_err(failed)?;
                transaction.pragma_update(None, "user_version", VERSION).map_err(failed)?;
            }
            found => return Err(StoreError::Newer { path: path.to_owned(), expected: VERSION, found }),
        }
        transaction.commit().map_err(failed)?;
        Ok(Self { path: path.to_owned(), connection })
    }

    fn failed(&self, error: &dyn std::fmt::Display) -> StoreError {
        StoreError::Database { path: self.path.clone(), reason: error.to_string() }
    }

    /// What the stage with this key printed, if it was run.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn stage(&self, key: &str) -> Result<Option<Value>, StoreError> {
        let found: Option<String> = self
            .connection
            .query_row("SELECT result FROM stages WHERE key = ?1", [key], |row| row.get(0))
            .optional()
            .map_err(|e| self.failed(&e))?;
        found.map(|text| serde_json::from_str(&text).map_err(|e| self.failed(&e))).transpose()
    }

    /// Seconds that the stage with this key took.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn stage_seconds(&self, key: &str) -> Result<Option<f64>, StoreError> {
        self.connection
            .query_row("SELECT seconds FROM stages WHERE key = ?1", [key], |row| row.get(0))
            .optional()
            .map_err(|e| self.failed(&e))
    }

    /// Stores what a stage printed.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn put_stage(
        &self,
        key: &str,
        kind: &str,
        command: &str,
        seconds: f64,
        result: &Value,
    ) -> Result<(), StoreError> {
        self.connection
            .execute(
                "INSERT OR REPLACE INTO stages VALUES (?1, ?2, ?3, ?4, ?5)",
                params![key, kind, command, seconds, result.to_string()],
            )
            .map(|_| ())
            .map_err(|e| self.failed(&e))
    }

    /// Stores a record under its sweep and its case, in place of an older one.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn put(&mut self, record: &Record) -> Result<(), StoreError> {
        let (sweep, name) = (record.sweep.clone().unwrap_or_default(), case_name(record));
        let json = serde_json::to_string(record).map_err(|e| self.failed(&e))?;
        let path = self.path.clone();
        let failed = |e: rusqlite::Error| StoreError::Database { path: path.clone(), reason: e.to_string() };
        let transaction = self.connection.transaction().map_err(failed)?;
        transaction
            .execute(
                "INSERT OR REPLACE INTO runs VALUES (?1, ?2, ?3, ?4, ?5)",
                params![record.id, sweep, name, i64::try_from(record.ended).unwrap_or(i64::MAX), json],
            )
            .map_err(failed)?;
        transaction
            .execute("DELETE FROM figures WHERE sweep = ?1 AND name = ?2", params![sweep, name])
            .map_err(failed)?;
        for (figure, found) in &record.figures {
            let (low, high) = found.interval.unzip();
            transaction
                .execute(
                    "INSERT INTO figures VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                    params![record.id, sweep, name, figure, found.value, low, high, found.unit],
                )
                .map_err(failed)?;
        }
        transaction.commit().map_err(failed)
    }

    /// All records, or those of one sweep, by sweep and case.
    ///
    /// # Errors
    /// The store cannot be read, or a record is of a newer version.
    pub fn records(&self, sweep: Option<&str>) -> Result<Vec<Record>, StoreError> {
        self.select("SELECT record FROM runs WHERE ?1 IS NULL OR sweep = ?1 ORDER BY sweep, name", sweep)
    }

    /// The records that `name` means: a sweep, or the only run whose id begins with it.
    ///
    /// # Errors
    /// There is none, or several runs.
    pub fn find(&self, name: &str) -> Result<Vec<Record>, StoreError> {
        let of_sweep = self.records(Some(name))?;
        if !of_sweep.is_empty() {
            return Ok(of_sweep);
        }
        let looks_like_id = !name.is_empty() && name.chars().all(|c| c.is_ascii_hexdigit());
        let mut runs = Vec::new();
        if looks_like_id {
            let sql = "SELECT record FROM runs WHERE substr(id, 1, length(?1)) = ?1 ORDER BY ended DESC";
            runs = self.select(sql, Some(&name.to_ascii_lowercase()))?;
            // The same run in several sweeps is one run.
            runs.dedup_by(|a, b| a.id == b.id);
        }
        match runs.len() {
            1 => Ok(runs),
            0 => Err(StoreError::Unknown { path: self.path.clone(), name: name.into(), known: self.known()? }),
            count => Err(StoreError::Ambiguous { name: name.into(), count }),
        }
    }

    /// The sweeps' names, in words.
    fn known(&self) -> Result<String, StoreError> {
        let mut statement = self
            .connection
            .prepare("SELECT sweep, count(*) FROM runs GROUP BY sweep ORDER BY sweep")
            .map_err(|e| self.failed(&e))?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)))
            .map_err(|e| self.failed(&e))?;
        let mut words = Vec::new();
        for row in rows {
            let (sweep, count) = row.map_err(|e| self.failed(&e))?;
            words.push(format!("the sweep {sweep} with {count} runs"));
        }
        Ok(if words.is_empty() { "no runs".into() } else { words.join(", ") })
    }

    fn select(&self, sql: &str, parameter: Option<&str>) -> Result<Vec<Record>, StoreError> {
        let mut statement = self.connection.prepare(sql).map_err(|e| self.failed(&e))?;
        let rows = statement.query_map([parameter], |row| row.get::<_, String>(0)).map_err(|e| self.failed(&e))?;
        let mut records = Vec::new();
        for row in rows {
            let text = row.map_err(|e| self.failed(&e))?;
            records.push(self.parse(&text)?);
        }
        Ok(records)
    }

    fn parse(&self, text: &str) -> Result<Record, StoreError> {
        let value: Value = serde_json::from_str(text).map_err(|e| self.failed(&e))?;
        let found = value["version"].as_i64().unwrap_or(0);
        if found > i64::from(RECORD_VERSION) {
            return Err(StoreError::Newer { path: self.path.clone(), expected: RECORD_VERSION.into(), found });
        }
        serde_json::from_value(value).map_err(|e| self.failed(&e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::{Better, Figure};

    fn record(id: &str, sweep: &str, task: &str, kl: f64) -> Record {
        Record {
            version: RECORD_VERSION,
            id: id.into(),
            sweep: Some(sweep.into()),
            sample: None,
            case: [("task".to_owned(), task.to_owned())].into(),
            figures: [("kl".to_owned(), Figure::exact(kl, "nats", Better::Lower))].into(),
            items: Default::default(),
            layers: Vec::new(),
            environment: Default::default(),
            seconds: 1.0,
            ended: 7,
        }
    }

    #[test]
    fn records_come_back_by_sweep_and_by_beginning_of_id() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.db");
        {
            let mut store = Store::open(&path).unwrap();
            store.put(&record("abc123", "s", "a", 0.5)).unwrap();
            store.put(&record("abd456", "s", "b", 0.6)).unwrap();
            // The same case again replaces.
            store.put(&record("abd457", "s", "b", 0.7)).unwrap();
        }
        let store = Store::open(&path).unwrap();
        assert_eq!(store.records(Some("s")).unwrap().len(), 2);
        assert_eq!(store.find("ABC").unwrap()[0].id, "abc123");
        assert_eq!(store.find("s").unwrap()[1].figures["kl"].value, 0.7);
        assert!(store.find("ab").unwrap_err().to_string().contains("2 runs"));
        let unknown = store.find("other").unwrap_err().to_string();
        assert!(unknown.contains("the sweep s with 2 runs"), "{unknown}");
        let sum: f64 = store.connection.query_row("SELECT sum(value) FROM figures", [], |row| row.get(0)).unwrap();
        assert!((sum - 1.2).abs() < 1e-12);
    }

    #[test]
    fn stages_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("r.db")).unwrap();
        assert_eq!(store.stage("k").unwrap(), None);
        store.put_stage("k", "plan", "edgellm plan", 0.5, &serde_json::json!({"a": 1})).unwrap();
        assert_eq!(store.stage("k").unwrap().unwrap()["a"], 1);
        assert_eq!(store.stage_seconds("k").unwrap(), Some(0.5));
    }

    #[test]
    fn what_is_newer_or_no_store_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.db");
        Store::open(&path).unwrap().connection.pragma_update(None, "user_version", 99).unwrap();
        assert!(Store::open(&path).unwrap_err().to_string().contains("found 99; use a newer"));
        let other = folder.path().join("text.db");
        std::fs::write(&other, "this is not a database, but longer than a header of one would be".repeat(20)).unwrap();
        assert!(Store::open(&other).unwrap_err().to_string().contains("not a database"));
        let newer = folder.path().join("n.db");
        let mut store = Store::open(&newer).unwrap();
        store.put(&Record { version: 9, ..record("a", "s", "t", 1.0) }).unwrap();
        assert!(store.records(None).unwrap_err().to_string().contains("found 9"));
    }
}
