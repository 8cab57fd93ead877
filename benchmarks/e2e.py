"""stub"""
QUICK=FULL=None
def run(*a,**k): raise SystemExit(3)
