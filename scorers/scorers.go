// SPDX-License-Identifier: Apache-2.0

// Package scorers holds the scorers that a profile may name: each turns the facts of a candidate row into a number
// from 0 (worst) to 1 (best). One file per scorer; [Registry] lists them. Formulas are those of llm-d-router v0.10 but
// for Baton's own; what a scorer says about an endpoint whose metrics are stale or missing stands at its type. Floor 3.
package scorers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// noParameters refuses any parameter.
func noParameters(raw config.Parameters) error { return raw.Decode(&struct{}{}) }

// known reports whether the row carries a value of that family that may be believed: fresh, and a number that a count
// or a usage can have.
func known(c *scheduler.Candidate, has uint16, value float64) bool {
	return c.Fresh && c.Metrics.Has&has != 0 && value >= 0 && value <= maxCount // false for NaN, too
}

// maxCount is more than any queue is long.
const maxCount = 1e9

// waiting is the queue depth with what was sent since it was scraped; where it is unknown, all that we know to be in
// flight stands for it, so that an endpoint nobody can look into does not seem idle.
func waiting(c *scheduler.Candidate) float64 {
	if known(c, pool.HasWaiting, c.Metrics.Waiting) {
		return c.Metrics.Waiting + float64(c.SinceScrape)
	}
	return float64(c.Requests)
}

// running is the same for the requests in the batch.
func running(c *scheduler.Candidate) float64 {
	if known(c, pool.HasRunning, c.Metrics.Running) {
		return c.Metrics.Running + float64(c.SinceScrape)
	}
	return float64(c.Requests)
}

// spread scores a load against the lowest and highest of the candidates: lowest 1, highest 0, all equal 1. out holds
// the loads and receives the scores.
func spread(out []float64) {
	if len(out) == 0 {
		return
	}
	low, high := out[0], out[0]
	for _, x := range out {
		low, high = min(low, x), max(high, x)
	}
	for i, x := range out {
		if high > low {
			out[i] = (high - x) / (high - low)
		} else {
			out[i] = 1
		}
	}
}
