// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// Warnings tells what in a valid configuration is not likely to be meant: a connector for engines that do not speak it,
// and switches that no configured connector heeds.
func Warnings(c *config.Disaggregation) []string {
	var warnings []string
	known, overlaps, pulls := connectors.Engines(), false, false
	for _, engine := range slices.Sorted(maps.Keys(c.KVConnector)) {
		connector, traits, err := connectors.Lookup(c.KVConnector[engine])
		if err != nil {
			continue // New says so
		}
		overlaps = overlaps || traits.Overlaps
		if _, ok := connector.(connectors.Puller); ok {
			pulls = true
		}
		if slices.Contains(known, engine) && !slices.Contains(traits.Engines, engine) {
			warnings = append(warnings, fmt.Sprintf("disaggregation.kvConnector.%s: %s is not known to work with this engine, but with %s",
				engine, traits.Name, strings.Join(traits.Engines, ", ")))
		}
	}
	if c.ParallelLegs && !overlaps {
		warnings = append(warnings, "disaggregation.parallelLegs: no configured connector is affected by it (offloading is)")
	}
	if c.PullCachedPrefix && !pulls {
		warnings = append(warnings, "disaggregation.pullCachedPrefix: no configured connector can do that (offloading can)")
	}
	return warnings
}
