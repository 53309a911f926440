"""What makes a release: wheels, the sdist, lists of what is in them, checks. No part of the package."""
