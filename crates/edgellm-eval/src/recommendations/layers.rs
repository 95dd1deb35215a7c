//! Which few layers cost most of the quality.

use std::collections::BTreeMap;

use super::listed;
use crate::figures::Layer;

/// The share of all costs that the layers named have together.
const MOST_OF_IT: f64 = 0.4;

/// The layers that together cost [`MOST_OF_IT`], if they are a quarter of all at most; configurations in which they are the
/// same are one sentence.
pub(super) fn costly<'a>(models: impl Iterator<Item = (String, &'a [Layer])>) -> Vec<String> {
    let mut found: BTreeMap<Vec<usize>, Found<'a>> = BTreeMap::new();
    for (name, layers) in models {
        let Some((places, share)) = few(layers) else { continue };
        let layers = places.iter().map(|place| layers[*place].name.as_str()).collect();
        let entry = found.entry(places).or_insert(Found { layers, names: Vec::new(), shares: Vec::new() });
        if !entry.names.contains(&name) {
            entry.names.push(name);
            entry.shares.push(share);
        }
    }
    found.into_values().map(|found| found.sentence()).collect()
}

struct Found<'a> {
    layers: Vec<&'a str>,
    /// Of the configurations.
    names: Vec<String>,
    shares: Vec<f64>,
}

impl Found<'_> {
    fn sentence(&self) -> String {
        let percent = |share: f64| format!("{:.0}%", 100.0 * share);
        let least = percent(self.shares.iter().copied().fold(f64::INFINITY, f64::min));
        let most = percent(self.shares.iter().copied().fold(0.0, f64::max));
        let share = if least == most { most } else { format!("{least} to {most}") };
        let verb = if self.layers.len() == 1 { "costs" } else { "cost" };
        let where_found = match self.names.as_slice() {
            names @ ([] | [_] | [_, _] | [_, _, _]) => listed(&names.iter().map(String::as_str).collect::<Vec<_>>()),
            [first, rest @ ..] => format!("{first} and {} more", rest.len()),
        };
        let layers = listed(&self.layers);
        format!("{where_found}: {layers} {verb} {share} of the KL of all layers, each measured alone.")
    }
}

/// The places of the costliest layers, in order, and their share.
fn few(layers: &[Layer]) -> Option<(Vec<usize>, f64)> {
    let mut costs: Vec<(usize, f64)> = layers
        .iter()
        .enumerate()
        .filter_map(|(place, layer)| Some((place, layer.sensitivity.filter(|cost| cost.is_finite())?.max(0.0))))
        .collect();
    let total: f64 = costs.iter().map(|cost| cost.1).sum();
    costs.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut sum = 0.0;
    let mut places = Vec::new();
    for (place, cost) in &costs {
        if sum >= MOST_OF_IT * total {
            break;
        }
        sum += cost;
        places.push(*place);
    }
    places.sort_unstable();
    (!places.is_empty() && places.len() <= costs.len() / 4).then(|| (places, sum / total))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(cost: impl Fn(usize) -> f64) -> Vec<Layer> {
        let layer = |i| Layer { name: format!("block.{i}"), sensitivity: Some(cost(i)), ..Layer::default() };
        (0..12).map(layer).collect()
    }

    #[test]
    fn few_layers_that_cost_most_are_named() {
        let layers = model(|i| if i == 3 || i == 7 { 1.0 } else { 0.1 });
        let said = costly([("m".to_owned(), layers.as_slice())].into_iter());
        assert_eq!(said, ["m: block.3 and block.7 cost 67% of the KL of all layers, each measured alone."]);
        // Evenly spread, nothing, or no number: nothing to say.
        for nothing in [model(|_| 0.1), model(|_| 0.0), model(|_| f64::NAN), Vec::new()] {
            assert!(costly([("m".to_owned(), nothing.as_slice())].into_iter()).is_empty());
        }
    }

    #[test]
    fn the_same_layers_of_several_configurations_are_one_sentence() {
        let one = model(|i| if i == 3 || i == 7 { 1.0 } else { 0.1 });
        let two = model(|i| if i == 3 || i == 7 { 1.8 } else { 0.1 });
        let all = ["a", "b", "c", "d"].map(|name| (name.to_owned(), if name == "a" { &one[..] } else { &two[..] }));
        let said = costly(all.into_iter());
        assert_eq!(
            said,
            ["a and 3 more: block.3 and block.7 cost 67% to 78% of the KL of all layers, each measured alone."]
        );
    }
}
