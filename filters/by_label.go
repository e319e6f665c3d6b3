// SPDX-License-Identifier: Apache-2.0

package filters

import (
	"slices"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// byLabel keeps the endpoints whose label has one of the valid values, or lacks it where that is allowed.
type byLabel struct {
	Label         string   `yaml:"label"`         // required
	ValidValues   []string `yaml:"validValues"`   // default none
	AllowsNoLabel bool     `yaml:"allowsNoLabel"` // default false; one of the last two must be set
}

func newByLabel(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	f := &byLabel{}
	if err := raw.Decode(f); err != nil {
		return nil, err
	}
	if f.Label == "" {
		return nil, raw.Errorf("label", "is required")
	}
	if len(f.ValidValues) == 0 && !f.AllowsNoLabel {
		return nil, raw.Errorf("validValues", "is required unless allowsNoLabel is true")
	}
	return f, nil
}

// Filter implements [scheduler.Filter].
func (f *byLabel) Filter(_ *scheduler.Cycle, cands []scheduler.Candidate) (kept int, reason string) {
	return keep(cands, func(c *scheduler.Candidate) bool {
		value, there := c.Endpoint.Labels[f.Label]
		if !there {
			return f.AllowsNoLabel
		}
		return slices.Contains(f.ValidValues, value)
	}), "label is not valid"
}
