// SPDX-License-Identifier: Apache-2.0

package filters

import (
	"fmt"
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// selectorParameters are a Kubernetes label selector; without parameters everything matches.
type selectorParameters struct {
	MatchLabels      map[string]string `yaml:"matchLabels"`
	MatchExpressions []struct {
		Key      string   `yaml:"key"`
		Operator string   `yaml:"operator"` // In, NotIn, Exists or DoesNotExist
		Values   []string `yaml:"values"`   // required for In and NotIn, forbidden for the others
	} `yaml:"matchExpressions"`
}

// labelSelector is label-selector-filter: it keeps the endpoints whose labels match.
type labelSelector struct{ requirements labels.Requirements }

func newLabelSelector(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	var p selectorParameters
	if err := raw.Decode(&p); err != nil {
		return nil, err
	}
	f := &labelSelector{}
	for _, key := range slices.Sorted(maps.Keys(p.MatchLabels)) {
		if err := f.add(key, selection.Equals, []string{p.MatchLabels[key]}); err != nil {
			return nil, raw.Errorf("matchLabels", "%v", err)
		}
	}
	operators := map[string]selection.Operator{
		"In": selection.In, "NotIn": selection.NotIn, "Exists": selection.Exists, "DoesNotExist": selection.DoesNotExist,
	}
	for i, e := range p.MatchExpressions {
		path := fmt.Sprintf("matchExpressions[%d]", i)
		op, known := operators[e.Operator]
		if !known {
			return nil, raw.Errorf(path+".operator", "%q, must be In, NotIn, Exists or DoesNotExist", e.Operator)
		}
		if err := f.add(e.Key, op, e.Values); err != nil {
			return nil, raw.Errorf(path, "%v", err)
		}
	}
	return f, nil
}

func (f *labelSelector) add(key string, op selection.Operator, values []string) error {
	r, err := labels.NewRequirement(key, op, values)
	if err != nil {
		return err
	}
	f.requirements = append(f.requirements, *r)
	return nil
}

// Filter implements [scheduler.Filter].
func (f *labelSelector) Filter(_ *scheduler.Cycle, cands []scheduler.Candidate) (kept int, reason string) {
	return keep(cands, f.matches), "labels do not match"
}

func (f *labelSelector) matches(c *scheduler.Candidate) bool {
	for i := range f.requirements {
		if !f.requirements[i].Matches(labels.Set(c.Endpoint.Labels)) {
			return false
		}
	}
	return true
}
