// SPDX-License-Identifier: Apache-2.0

// Package pickers holds the pickers that a profile may name: each orders the scored candidates. One file per picker;
// [Registry] lists them. Random choices are made with the cycle's own repeatable numbers. Floor 3.
package pickers

import (
	"github.com/baton-epp/baton/config"
)

// parameters are those of every picker.
type parameters struct {
	// MaxNumOfEndpoints is how many endpoints are named to the gateway; default 1, 0 and less = 1. The ranking goes on
	// behind them, for retries.
	MaxNumOfEndpoints int `yaml:"maxNumOfEndpoints"`
}

func decode(raw config.Parameters) (parameters, error) {
	p := parameters{MaxNumOfEndpoints: 1}
	err := raw.Decode(&p)
	p.MaxNumOfEndpoints = max(1, p.MaxNumOfEndpoints)
	return p, err
}

// depth is how far the order must reach, and how many may be named.
func (p parameters) depth(n, want int) (ordered, send int) {
	send = min(n, p.MaxNumOfEndpoints)
	return min(n, max(want, send)), send
}
