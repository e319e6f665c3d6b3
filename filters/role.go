// SPDX-License-Identifier: Apache-2.0

package filters

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// role is decode-filter, prefill-filter and encode-filter: it keeps the endpoints whose role label (llm-d.ai/role)
// allows a phase. Without the label an endpoint decodes, and neither prefills nor encodes.
type role struct {
	want      pool.Role
	unlabeled bool // endpoints without the label pass
	reason    string
}

func newDecodeRole(_ *scheduler.Builder, p config.Parameters) (any, error) {
	return &role{want: pool.RoleDecode, unlabeled: true, reason: "role does not decode"}, p.Decode(&struct{}{})
}

func newPrefillRole(_ *scheduler.Builder, p config.Parameters) (any, error) {
	return &role{want: pool.RolePrefill, reason: "role does not prefill"}, p.Decode(&struct{}{})
}

func newEncodeRole(_ *scheduler.Builder, p config.Parameters) (any, error) {
	return &role{want: pool.RoleEncode, reason: "role does not encode"}, p.Decode(&struct{}{})
}

// Filter implements [scheduler.Filter].
func (f *role) Filter(_ *scheduler.Cycle, cands []scheduler.Candidate) (kept int, reason string) {
	return keep(cands, func(c *scheduler.Candidate) bool {
		if c.Endpoint.Role == 0 {
			return f.unlabeled
		}
		return c.Endpoint.Role.Has(f.want)
	}), f.reason
}
