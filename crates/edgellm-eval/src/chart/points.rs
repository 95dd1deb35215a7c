//! Series of points over two axes.

use plotters::prelude::*;

use super::{COLOURS, GRID, GROUND, INK, draw, failed, range, ticks::Axis};
use crate::error::Result;

/// Width and height in pixels.
const SIZE: (u32, u32) = (900, 560);
/// Points of a line beyond which they are not marked.
const MOST_MARKERS: usize = 60;

/// Points of one kind, joined by a line or not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// What it is called in the legend.
    pub label: String,
    /// `(x, y)`.
    pub points: Vec<(f64, f64)>,
    /// Whether the points are joined.
    pub line: bool,
    /// `(x, low, high)`: vertical lines of uncertainty.
    pub intervals: Vec<(f64, f64, f64)>,
    /// Drawn thin and pale, in the colour of the series after it, and not in the legend.
    pub pale: bool,
}

/// What a chart says around its points.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Chart<'a> {
    /// Above everything.
    pub title: &'a str,
    /// Of the horizontal axis.
    pub x: &'a str,
    /// Of the vertical axis.
    pub y: &'a str,
    /// Whether the vertical axis is logarithmic; points at or below 0 are left out then.
    pub log_y: bool,
    /// The same of the horizontal axis.
    pub log_x: bool,
}

impl Series {
    /// Points that are joined.
    pub fn line(label: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self { label: label.into(), points, line: true, ..Self::default() }
    }

    /// Only what has a place in the chart, in its coordinates.
    fn placed(&self, chart: &Chart<'_>) -> Self {
        let place = |value: f64, log: bool| if log { value.log10() } else { value };
        let at = |x: f64, y: f64| (place(x, chart.log_x), place(y, chart.log_y));
        let points = self.points.iter().map(|&(x, y)| at(x, y)).filter(|(x, y)| x.is_finite() && y.is_finite());
        let intervals = self.intervals.iter().map(|&(x, low, high)| (at(x, low), at(x, high)));
        let intervals = intervals.map(|((x, low), (_, high))| (x, low, high));
        let whole = |&(x, low, high): &(f64, f64, f64)| x.is_finite() && low.is_finite() && high.is_finite();
        Self { points: points.collect(), intervals: intervals.filter(whole).collect(), ..self.clone() }
    }

    /// All that must fit into the chart.
    fn extent(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        let ends = self.intervals.iter().flat_map(|&(x, low, high)| [(x, low), (x, high)]);
        self.points.iter().copied().chain(ends)
    }
}

impl Chart<'_> {
    /// The chart of some series as SVG.
    ///
    /// # Errors
    /// There is no point to show.
    pub fn points(&self, series: &[Series]) -> Result<String> {
        let series: Vec<Series> = series.iter().map(|s| s.placed(self)).filter(|s| !s.points.is_empty()).collect();
        let all = || series.iter().flat_map(Series::extent);
        let (Some(x), Some(y)) = (range(all().map(|p| p.0)), range(all().map(|p| p.1))) else {
            return Err(failed("there is no point to show"));
        };
        let corner = free_corner(all(), x, y);
        draw(SIZE, |area| {
            let mut chart = ChartBuilder::on(area)
                .caption(self.title, ("sans-serif", 20).into_font().color(&INK))
                .margin(16)
                .x_label_area_size(46)
                .y_label_area_size(72)
                .build_cartesian_2d(Axis::new(x, self.log_x, 10), Axis::new(y, self.log_y, 8))
                .map_err(failed)?;
            let text = ("sans-serif", 14).into_font().color(&INK);
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(GRID)
                .axis_style(INK)
                .label_style(text.clone())
                .axis_desc_style(text.clone())
                .x_desc(self.x)
                .y_desc(self.y)
                .draw()
                .map_err(failed)?;
            // A pale series has the colour of the one that follows, so that it takes no number.
            let mut index = 0;
            for series in &series {
                let colour = COLOURS[index % COLOURS.len()];
                let points = series.points.iter().copied();
                if series.pale {
                    let line = LineSeries::new(points, colour.mix(0.3).stroke_width(1));
                    chart.draw_series(line).map_err(failed)?;
                    continue;
                }
                if series.line {
                    let line = LineSeries::new(points.clone(), colour.stroke_width(2));
                    chart.draw_series(line).map_err(failed)?;
                }
                for &(x, low, high) in &series.intervals {
                    let line = PathElement::new(vec![(x, low), (x, high)], colour.stroke_width(1));
                    chart.draw_series(std::iter::once(line)).map_err(failed)?;
                }
                let shape = index % 3;
                index += 1;
                if series.line && points.len() > MOST_MARKERS {
                    let line = LineSeries::new(std::iter::empty(), colour.stroke_width(2));
                    let legend = move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2));
                    chart.draw_series(line).map_err(failed)?.label(&series.label).legend(legend);
                    continue;
                }
                // A circle, a triangle or a cross, so that colour is not all that tells series apart.
                let (fill, stroke) = (colour.filled(), colour.stroke_width(2));
                let at = |(x, y)| (x + 8, y);
                match shape {
                    0 => chart
                        .draw_series(points.map(|p| Circle::new(p, 4, fill)))
                        .map_err(failed)?
                        .label(&series.label)
                        .legend(move |p| Circle::new(at(p), 4, fill)),
                    1 => chart
                        .draw_series(points.map(|p| TriangleMarker::new(p, 5, fill)))
                        .map_err(failed)?
                        .label(&series.label)
                        .legend(move |p| TriangleMarker::new(at(p), 5, fill)),
                    _ => chart
                        .draw_series(points.map(|p| Cross::new(p, 4, stroke)))
                        .map_err(failed)?
                        .label(&series.label)
                        .legend(move |p| Cross::new(at(p), 4, stroke)),
                };
            }
            if index < 2 && series.iter().all(|s| s.label.is_empty()) {
                return Ok(());
            }
            chart
                .configure_series_labels()
                .position(corner)
                .background_style(GROUND.mix(0.8))
                .border_style(GRID)
                .label_font(text)
                .margin(10)
                .draw()
                .map_err(failed)
        })
    }
}

/// The corner with the fewest points, for the legend; of equal ones the upper right.
fn free_corner(points: impl Iterator<Item = (f64, f64)>, x: (f64, f64), y: (f64, f64)) -> SeriesLabelPosition {
    let mut counts = [0usize; 4];
    for point in points {
        let (right, up) = ((point.0 - x.0) / (x.1 - x.0), (point.1 - y.0) / (y.1 - y.0));
        let places =
            [(right > 0.65, up > 0.6), (right < 0.35, up > 0.6), (right > 0.65, up < 0.4), (right < 0.35, up < 0.4)];
        for (count, place) in counts.iter_mut().zip(places) {
            *count += usize::from(place == (true, true));
        }
    }
    match (0..4).min_by_key(|corner| counts[*corner]) {
        Some(1) => SeriesLabelPosition::UpperLeft,
        Some(2) => SeriesLabelPosition::LowerRight,
        Some(3) => SeriesLabelPosition::LowerLeft,
        _ => SeriesLabelPosition::UpperRight,
    }
}
