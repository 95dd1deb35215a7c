//! Series of points over two axes.

use plotters::prelude::*;

use super::{COLOURS, GRID, GROUND, INK, draw, failed, number, range};
use crate::error::Result;

/// Width and height in pixels.
const SIZE: (u32, u32) = (900, 560);
/// Points of a line beyond which they are not marked.
const MOST_MARKERS: usize = 60;

/// Points of one kind, joined by a line or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// What it is called in the legend.
    pub label: String,
    /// `(x, y)`.
    pub points: Vec<(f64, f64)>,
    /// Whether the points are joined.
    pub line: bool,
    /// `(x, low, high)`: vertical lines of uncertainty.
    pub intervals: Vec<(f64, f64, f64)>,
}

/// What a chart says around its points.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart<'a> {
    /// Above everything.
    pub title: &'a str,
    /// Of the horizontal axis.
    pub x: &'a str,
    /// Of the vertical axis.
    pub y: &'a str,
    /// Whether the vertical axis is logarithmic; points at or below 0 are left out then.
    pub log_y: bool,
}

impl Chart<'_> {
    /// The chart of some series as SVG.
    ///
    /// # Errors
    /// There is no point to show.
    pub fn points(&self, series: &[Series]) -> Result<String> {
        let shown = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && (!self.log_y || y > 0.0);
        let place = |y: f64| if self.log_y { y.log10() } else { y };
        let series: Vec<Series> = series
            .iter()
            .map(|s| Series {
                points: s.points.iter().copied().filter(shown).collect(),
                intervals: s
                    .intervals
                    .iter()
                    .copied()
                    .filter(|&(x, low, high)| shown(&(x, low)) && shown(&(x, high)))
                    .collect(),
                ..s.clone()
            })
            .filter(|s| !s.points.is_empty())
            .collect();
        let ends =
            |s: &Series| s.intervals.iter().flat_map(|&(x, low, high)| [(x, low), (x, high)]).collect::<Vec<_>>();
        let all = || series.iter().flat_map(|s| s.points.iter().copied().chain(ends(s)));
        let (Some(x), Some(y)) = (range(all().map(|p| p.0)), range(all().map(|p| place(p.1)))) else {
            return Err(failed("there is no point to show"));
        };
        draw(SIZE, |area| {
            let mut chart = ChartBuilder::on(area)
                .caption(self.title, ("sans-serif", 20).into_font().color(&INK))
                .margin(16)
                .x_label_area_size(46)
                .y_label_area_size(72)
                .build_cartesian_2d(x.0..x.1, y.0..y.1)
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
                .x_labels(10)
                .y_labels(8)
                .x_label_formatter(&|x| number(*x))
                .y_label_formatter(&|y| number(if self.log_y { 10f64.powf(*y) } else { *y }))
                .draw()
                .map_err(failed)?;
            for (index, series) in series.iter().enumerate() {
                let colour = COLOURS[index % COLOURS.len()];
                let points: Vec<(f64, f64)> = series.points.iter().map(|p| (p.0, place(p.1))).collect();
                if series.line {
                    let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2));
                    chart.draw_series(line).map_err(failed)?;
                }
                for &(x, low, high) in &series.intervals {
                    let line = PathElement::new(vec![(x, place(low)), (x, place(high))], colour.stroke_width(1));
                    chart.draw_series(std::iter::once(line)).map_err(failed)?;
                }
                if series.line && points.len() > MOST_MARKERS {
                    let line = LineSeries::new(std::iter::empty(), colour.stroke_width(2));
                    let legend = move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2));
                    chart.draw_series(line).map_err(failed)?.label(&series.label).legend(legend);
                    continue;
                }
                // A circle, a triangle or a cross, so that colour is not all that tells series apart.
                let (points, fill, stroke) = (points.iter().copied(), colour.filled(), colour.stroke_width(2));
                let at = |(x, y)| (x + 8, y);
                match index % 3 {
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
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(GROUND)
                .border_style(GRID)
                .label_font(text)
                .margin(10)
                .draw()
                .map_err(failed)
        })
    }
}
