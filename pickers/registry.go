// SPDX-License-Identifier: Apache-2.0

package pickers

import "github.com/baton-epp/baton/scheduler"

// Registry lists the pickers by llm-d's type names.
func Registry() scheduler.Registry {
	return scheduler.Registry{
		"max-score-picker":       newMaxScore,
		"random-picker":          newRandom,
		"weighted-random-picker": newWeightedRandom,
	}
}
