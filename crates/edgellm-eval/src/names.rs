//! What to call a record among others: by what tells it from them.

use std::collections::BTreeMap;

use crate::figures::Record;

/// Names of a case in the order in which they are said; others follow.
const ORDER: [&str; 7] = ["task", "model", "adapter", "vote", "policy", "budget", "device"];

/// The names that have more than one value among some records.
pub(crate) struct Names(Vec<String>);

impl Names {
    pub(crate) fn of<'a>(records: impl IntoIterator<Item = &'a Record>) -> Self {
        let records: Vec<&Record> = records.into_iter().collect();
        let mut names: Vec<String> = records.iter().flat_map(|record| record.case.keys().cloned()).collect();
        let place = |name: &str| ORDER.iter().position(|known| *known == name).unwrap_or(ORDER.len());
        names.sort_by(|a, b| place(a).cmp(&place(b)).then(a.cmp(b)));
        names.dedup();
        names.retain(|name| records.iter().any(|record| record.case.get(name) != records[0].case.get(name)));
        Self(names)
    }

    /// The values of a record that differ between records, without those of these names. Empty if there are none.
    pub(crate) fn label(&self, record: &Record, without: &[&str]) -> String {
        let kept = self.0.iter().filter(|name| !without.contains(&name.as_str()));
        let value = |name: &String| Some(said(name, record.case.get(name)?));
        kept.filter_map(value).collect::<Vec<_>>().join(", ")
    }

    /// Like [`label`](Self::label); of a record that nothing tells apart, its policy, model or id.
    pub(crate) fn name(&self, record: &Record, without: &[&str]) -> String {
        let label = self.label(record, without);
        if !label.is_empty() {
            return label;
        }
        let of = |name: &str| record.case.get(name).cloned();
        of("policy").or_else(|| of("model")).unwrap_or_else(|| record.id.clone())
    }

    /// Records by their labels.
    pub(crate) fn groups<'a>(
        &self,
        records: impl IntoIterator<Item = &'a Record>,
        without: &[&str],
    ) -> BTreeMap<String, Vec<&'a Record>> {
        let mut groups: BTreeMap<String, Vec<&Record>> = BTreeMap::new();
        for record in records {
            groups.entry(self.label(record, without)).or_default().push(record);
        }
        groups
    }
}

/// A value as it is said: a bare number of a budget is bits per weight, and values such as `none` say nothing alone.
fn said(name: &str, value: &str) -> String {
    match (name, value) {
        ("budget", value) if value.parse::<f64>().is_ok() => format!("{value} bits"),
        ("adapter" | "vote" | "device" | "budget", "none") => format!("no {name}"),
        ("seed", value) => format!("seed {value}"),
        _ => value.to_owned(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::figures::{Figures, RECORD_VERSION};

    pub(crate) fn named(case: &[(&str, &str)]) -> Record {
        Record {
            version: RECORD_VERSION,
            id: "abc".into(),
            sweep: None,
            sample: None,
            case: case.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect(),
            figures: Figures::new(),
            items: BTreeMap::new(),
            layers: Vec::new(),
            environment: BTreeMap::new(),
            seconds: 0.0,
            ended: 0,
        }
    }

    #[test]
    fn only_what_differs_is_said() {
        let records = [
            named(&[("model", "m"), ("policy", "solve"), ("budget", "3"), ("task", "text"), ("adapter", "none")]),
            named(&[("model", "m"), ("policy", "dense"), ("task", "text"), ("adapter", "tuned")]),
        ];
        let names = Names::of(&records);
        assert_eq!(names.label(&records[0], &[]), "no adapter, solve, 3 bits");
        assert_eq!(names.label(&records[1], &["adapter"]), "dense");
        let alone = Names::of(&records[..1]);
        assert_eq!((alone.label(&records[0], &[]), alone.name(&records[0], &[])), (String::new(), "solve".to_owned()));
        assert_eq!(Names::of([]).name(&named(&[]), &[]), "abc");
        assert_eq!(names.groups(&records, &["adapter", "policy", "budget"]).len(), 1);
    }
}
